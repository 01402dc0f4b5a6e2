"""The one door to lm-eval, an optional package: its tasks as documents, requests and figures; no model of its own runs.

A name is a task or group that the package brings, or a YAML file of a task. Such a file may be anybody's: it is read
without tags (lm-eval's `!function` runs code), its templates run in jinja's sandbox, and metrics that lm-eval would
fetch as code are refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from afina.errors import DataError, RecipeError, ResourceError
from afina.evaluate.systems.asking import Answer, Continue, Request, Weigh
from afina.language import _
from afina.recipe.document import Unreadable, decode, read
from afina.recipe.problem import Problem

FEWSHOT_SEED = 1234
"""lm-eval's own."""
NEW_TOKENS = 256
"""lm-eval's own, where a task does not say."""
FOREIGN = ("class", "custom_dataset", "process_docs", "process_results", "dataset_kwargs.trust_remote_code")
"""Keys of a task file that name code."""


@dataclass(frozen=True)
class Document:
    """One document of one of lm-eval's tasks; `question` and `answer` for people: some tasks have several texts."""

    task: Any
    doc: Any
    number: int
    question: str
    answer: str

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.task.task_name)


@dataclass
class Benchmark:
    """Documents with what is asked of each: lm-eval's instances, in the order of its requests."""

    documents: list[Document]
    instances: list[list[Any]] = field(default_factory=list)

    def requests(self, place: int) -> list[Request]:
        """What is asked of one document."""
        return [one for instance in self.instances[place] for one in _requests(instance)]

    def judge(self, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
        """Every metric of each document by lm-eval's own marking, named as it names them: `metric,filter`."""
        asked: dict[int, list[Any]] = {}
        for place, given in zip(places, answers, strict=True):
            left = iter(given)
            asked[place] = []
            for instance in self.instances[place]:
                one = copy(instance)
                one.resps = [_response(instance, next(left)) for _request in _requests(instance)]
                one.filtered_resps = {}
                asked[place].append(one)
        by_task: dict[str, list[int]] = {}
        for place in places:
            by_task.setdefault(self.documents[place].name, []).append(place)
        found: dict[int, dict[str, Any]] = {}
        for mine in by_task.values():
            task = self.documents[mine[0]].task
            task._instances = [instance for place in mine for instance in asked[place]]
            task.apply_filters()
            for place in mine:
                found[place] = _metrics(task, self.documents[place].doc, asked[place])
        return [found[place] for place in places]

    def aggregate(self, places: Sequence[int], metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Of each task each metric, as lm-eval sums it up."""
        gathered: dict[str, dict[str, list[Any]]] = {}
        tasks = {}
        for place, known in zip(places, metrics, strict=True):
            document = self.documents[place]
            tasks[document.name] = document.task
            for key, value in known.items():
                gathered.setdefault(document.name, {}).setdefault(key, []).append(value)
        return {
            name: {key: _aggregated(tasks[name], key, values) for key, values in by_metric.items()}
            for name, by_metric in gathered.items()
        }

    def higher_is_better(self, place: int, metric: str) -> bool:
        """Whether more of a metric (`metric,filter`) is better."""
        return bool(self.documents[place].task.higher_is_better().get(metric.partition(",")[0], True))


@lru_cache(maxsize=4)
def documents(names: tuple[str, ...], fewshot: int | None, folder: Path) -> list[Document]:
    """The documents of these tasks. Raises ResourceError without lm-eval, RecipeError and DataError."""
    manager = _manager()
    found: dict[str, Any] = {}
    for name in names:
        wanted: Any = _local(folder / name) if name.endswith((".yaml", ".yml")) else name
        if isinstance(wanted, str) and manager._entry(wanted) is None:
            raise RecipeError(
                _("lm-eval knows no task {name}.").format(name=name),
                hint=_("lm-eval ls tasks lists those it has; a task of your own is a YAML file."),
            )
        with _telling(name):
            found |= manager.load([wanted])["tasks"]
    every: list[Document] = []
    for task in found.values():
        if fewshot is not None:
            task.set_config(key="num_fewshot", value=fewshot)
        with _telling(str(task.task_name)):
            for number, doc in enumerate(task.eval_docs):
                target, text = task.doc_to_target(doc), task.doc_to_text(doc)
                choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
                answer = choices[target] if isinstance(target, int) and target < len(choices) else target
                every.append(Document(task, doc, number, text if isinstance(text, str) else repr(text), str(answer)))
    return every


def prepare(chosen: list[Document]) -> Benchmark:
    """The requests of these documents, few-shot examples before each, without a chat template: as scores are
    published."""
    instances = []
    for document in chosen:  # the examples are drawn anew, alike every time
        document.task.set_fewshot_seed(seed=FEWSHOT_SEED)
    for document in chosen:
        task, doc = document.task, document.doc
        shots = task.config.num_fewshot or 0
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        metadata = (task.config["task"], document.number, task.config.repeats)
        made = task.construct_requests(doc=doc, ctx=context, metadata=metadata)
        instances.append(made if isinstance(made, list) else [made])
    return Benchmark(chosen, instances)


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """What lm-eval, its data sets and its templates raise, in a sentence."""
    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        TemplateError,
    ) as error:
        raise DataError(
            _("The data of lm-eval's task {name} cannot be had: {reason}").format(name=name, reason=_line(error)),
            hint=_("Its data sets come from the hub: fetch them once where there is a network."),
        ) from error


def _requests(instance: Any) -> list[Request]:
    """As often as the task repeats it; only what is drawn can differ."""
    kind, arguments = instance.request_type, instance.args
    if kind == "generate_until":
        text, options = arguments[0], arguments[1]
        until = options.get("until") or []
        until = tuple([until] if isinstance(until, str) else until)
        heat = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS)
        return [Continue(text, until, new, heat, seed) for seed in range(instance.repeats or 1)]
    text, continuation = ("", arguments[0]) if kind == "loglikelihood_rolling" else arguments[:2]
    return [Weigh(text, continuation)] * (instance.repeats or 1)


def _response(instance: Any, answer: Answer) -> Any:
    """As lm-eval's models answer."""
    if instance.request_type == "generate_until":
        return answer.text
    total, greedy = answer.scores
    return total if instance.request_type == "loglikelihood_rolling" else (total, bool(greedy))


def _metrics(task: Any, doc: Any, instances: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for chosen in instances[0].filtered_resps:
        results = task.process_results(doc, [instance.filtered_resps[chosen] for instance in instances])
        found |= {f"{metric},{chosen}": value for metric, value in results.items()}
    return found


def _aggregated(task: Any, key: str, values: list[Any]) -> float:
    metric = key.partition(",")[0]
    aggregate = task.aggregation().get(metric)
    return float(aggregate(values) if aggregate else sum(values) / len(values))


@cache
def _manager() -> Any:
    try:
        import lm_eval.utils
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError(
            _("Tasks of lm-eval need the package lm-eval, which is not installed."),
            hint=_('Run: pip install "afina[lm-eval]"'),
        ) from error
    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters |= plain.filters
    lm_eval.utils.env = sandbox
    return TaskManager()


def _local(file: Path) -> dict[str, Any]:
    """The task that a YAML file describes, its data files found beside it. Raises DataError."""
    problems: list[Problem] = []
    try:
        root = read(decode(file.read_bytes()), problems)
    except OSError as error:
        raise DataError(_("This file cannot be read: {reason}").format(reason=_line(error)), file=file) from error
    except Unreadable as error:
        problems, root = [error.problem], None
    task = None if root is None or problems else root.plain()
    if not isinstance(task, dict):
        first = problems[0] if problems else None
        raise DataError(
            first.message if first else _("This is no task of lm-eval."),
            file=file,
            line=first.place.line if first else 1,
        )
    _refuse_code(task, file)
    kwargs = task.get("dataset_kwargs")
    if isinstance(kwargs, dict) and (files := kwargs.get("data_files")) is not None:
        kwargs["data_files"] = _beside(files, file.parent)
    return task


def _refuse_code(task: dict[str, Any], file: Path) -> None:
    from lm_eval.api.registry import METRIC_REGISTRY, get_metric

    get_metric("acc")  # fills the registry
    wanted = task.get("metric_list") or []
    metrics = [str(one.get("metric")) for one in wanted if isinstance(one, dict)]
    foreign = [name for name in FOREIGN if name in task] + [name for name in metrics if name not in METRIC_REGISTRY]
    foreign += ["hf_evaluate"] if any(isinstance(one, dict) and one.get("hf_evaluate") for one in wanted) else []
    if foreign or "include" in task:
        raise DataError(
            _("{name} would run code or read other files, which a task file may not.").format(
                name=(foreign or ["include"])[0]
            ),
            file=file,
            hint=_("Use the metrics that lm-eval brings, and templates."),
        )


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return str(folder / str(files))


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
