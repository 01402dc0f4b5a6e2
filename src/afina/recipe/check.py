"""The rules between keys: what each key alone cannot know.

Each rule is a small function from a recipe to its faults; `RULES` lists them. Knows nothing of YAML: `load` finds the
line of the key that a fault names. A fault also names the keys it was concluded from, so that a rule is silent where
one of them is already reported as wrong.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from afina.language import _
from afina.recipe.problem import Path
from afina.recipe.schema import Full, Lora, PrefixTuning, PromptTuning, Recipe, Task
from afina.recipe.schema.task import KEYS_OF


class Fault(NamedTuple):
    """A broken rule: the key concerned, what to say, and the other keys that were read."""

    path: Path
    message: str
    read: tuple[Path, ...] = ()


Rule = Callable[[Recipe], Iterator[Fault]]


def mapping_goes_with_its_dialect(recipe: Recipe) -> Iterator[Fault]:
    """`dialect: mapping` needs a mapping; a mapping makes auto mean mapping, and goes with no other dialect."""
    mapping, dialect = ("data", "mapping"), ("data", "dialect")
    if recipe.data.dialect == "mapping" and recipe.data.mapping is None:
        message = _("This dialect needs data.mapping with the templates user and assistant.")
        yield Fault(dialect, message, (mapping,))
    if recipe.data.mapping is not None and recipe.data.dialect not in ("mapping", "auto"):
        message = _("A mapping is used only with dialect: mapping, and the dialect here is {dialect}.")
        yield Fault(mapping, message.format(dialect=recipe.data.dialect), (dialect,))


def sources_are_named(recipe: Recipe) -> Iterator[Fault]:
    """Every list of files holds at least one, and none is empty."""
    named: list[tuple[Path, object]] = [
        (("data", "train"), recipe.data.train),
        (("data", "validation"), recipe.data.validation),
    ]
    named += [
        (("tasks", number, "data"), task.data) for number, task in enumerate(recipe.tasks) if task.data is not None
    ]
    for path, sources in named:
        if sources == []:
            yield Fault(path, _("This list names no file."))
        for number, source in enumerate(sources if isinstance(sources, list) else [sources]):
            if isinstance(source, str) and not _is_place(source):
                yield Fault(
                    (*path, number) if isinstance(sources, list) else path, _("This is not the name of a file.")
                )


def places_are_named(recipe: Recipe) -> Iterator[Fault]:
    """The base model, the chat template and a teacher are names of something."""
    named: list[tuple[Path, str | None]] = [
        (("model", "base"), recipe.model.base),
        (("model", "chat_template"), recipe.model.chat_template),
    ]
    if recipe.training.distill is not None:
        named.append((("training", "distill", "teacher"), recipe.training.distill.teacher))
    for path, value in named:
        if value is not None and not _is_place(value):
            yield Fault(path, _("This is not the name of a file or folder."))


def encodings_are_known(recipe: Recipe) -> Iterator[Fault]:
    """Each encoding is one that Python reads text with."""
    if not recipe.data.encoding:
        yield Fault(("data", "encoding"), _("Name at least one encoding, such as utf-8."))
    for number, name in enumerate(recipe.data.encoding):
        if not _reads_text(name):
            message = _("This encoding is not known. Write utf-8, latin-1, cp1252 or another of Python's.")
            yield Fault(("data", "encoding", number), message)


def labels_are_a_choice(recipe: Recipe) -> Iterator[Fault]:
    """Labels are two or more, all different, none empty."""
    for number, task in enumerate(recipe.tasks):
        path = ("tasks", number, "labels")
        if task.labels is None:
            continue
        if len(set(task.labels)) < 2:
            yield Fault(path, _("A classification needs at least two different labels."))
        for position, label in enumerate(task.labels):
            if label in task.labels[:position]:
                yield Fault((*path, position), _("The label {label} stands twice.").format(label=label))
            if not label.strip():
                yield Fault((*path, position), _("A label cannot be empty."))


def task_keys_suit_their_kind(recipe: Recipe) -> Iterator[Fault]:
    """A key that only some kinds of task read stands in none of the others; what a kind needs is there."""
    special = {key for keys in KEYS_OF.values() for key in keys}
    for number, task in enumerate(recipe.tasks):
        read = (("tasks", number, "kind"),)
        for key in sorted((task.model_fields_set & special) - {*KEYS_OF[task.kind]}):
            kinds = ", ".join(kind for kind, keys in KEYS_OF.items() if key in keys)
            if getattr(task, key) != Task.model_fields[key].default:
                message = _("{key} belongs to tasks of kind {kinds}.").format(key=key, kinds=kinds)
                yield Fault(("tasks", number, key), message, read)
        if task.data is None and "data" in KEYS_OF[task.kind]:
            yield Fault(("tasks", number), _("A task of this kind needs data, with held-out samples."), read)
        if task.kind == "lm-eval" and not task.benchmarks:
            yield Fault(("tasks", number), _("A task of kind lm-eval needs benchmarks: which of its tasks."), read)
        if task.kind == "judge" and not task.judge:
            yield Fault(("tasks", number), _("A task of kind judge needs judge: who judges."), read)


def task_names_differ(recipe: Recipe) -> Iterator[Fault]:
    """The report tells tasks apart by their names."""
    names = [task.name for task in recipe.tasks]
    for number, name in enumerate(names):
        if not name.strip():
            yield Fault(("tasks", number, "name"), _("A task needs a name for the report."))
        elif name in names[:number]:
            first = ("tasks", names.index(name), "name")
            yield Fault(("tasks", number, "name"), _("Two tasks are called {name}.").format(name=name), (first,))


def tasks_while_training_are_tasks(recipe: Recipe) -> Iterator[Fault]:
    """What is asked while it trains is asked after it too, and needs no second model to compare with."""
    training, kinds = recipe.training, {task.name: task.kind for task in recipe.tasks}
    names = ", ".join(kinds) or _("none")
    for number, name in enumerate(training.evaluate):
        place = ("training", "evaluate", number)
        if name not in kinds:
            message = _("There is no task {name}. The recipe's tasks are: {names}.")
            yield Fault(place, message.format(name=name, names=names), (("tasks",),))
        elif kinds[name] == "judge":
            message = _("The task {name} compares two models, and while one trains there is no second.")
            yield Fault(place, message.format(name=name))
        if name in training.evaluate[:number]:
            yield Fault(place, _("The task {name} stands twice.").format(name=name))
    if training.best_by is None:
        return
    path = ("training", "best_by")
    if training.best_by not in training.evaluate:
        message = _("The task {name} is not asked while it trains. Add it to training.evaluate.")
        yield Fault(path, message.format(name=training.best_by), (("training", "evaluate"),))
    if training.keep == "last":
        yield Fault(path, _("training.keep is last, so nothing is chosen. Write keep: best."), (("training", "keep"),))


def warmup_fits_the_run(recipe: Recipe) -> Iterator[Fault]:
    """From 1 on the warm-up counts steps: whole ones, and fewer than the run has."""
    training, path = recipe.training, ("training", "warmup")
    if training.warmup < 1:
        return
    if not training.warmup.is_integer():
        message = _("A warm-up is a share below 1 or a whole number of steps; {warmup} is neither.")
        yield Fault(path, message.format(warmup=training.warmup))
    elif training.steps is not None and training.warmup >= training.steps:
        message = _("The warm-up of {warmup:.0f} steps never ends: the run has {steps} steps.")
        yield Fault(path, message.format(warmup=training.warmup, steps=training.steps), (("training", "steps"),))


def micro_batch_holds_a_sample(recipe: Recipe) -> Iterator[Fault]:
    """The longest sample must fit into what is computed at once."""
    tokens, longest = recipe.training.micro_batch_tokens, recipe.model.max_length
    if isinstance(recipe.method, PromptTuning | PrefixTuning):
        longest += recipe.method.virtual_tokens
    if tokens is not None and tokens < longest:
        message = _("{tokens} tokens cannot hold a sample of {longest}, which model.max_length allows. Raise it.")
        yield Fault(
            ("training", "micro_batch_tokens"),
            message.format(tokens=tokens, longest=longest),
            (("model", "max_length"), ("method", "virtual_tokens")),
        )


def formats_differ(recipe: Recipe) -> Iterator[Fault]:
    """Each format is exported once."""
    formats = recipe.export.formats
    for number, name in enumerate(formats):
        if name in formats[:number]:
            yield Fault(("export", "formats", number), _("The format {name} stands twice.").format(name=name))


def targets_are_named(recipe: Recipe) -> Iterator[Fault]:
    """Adapters go to at least one layer, and no layer is named twice."""
    targets = recipe.method.targets if isinstance(recipe.method, Lora) else None
    if targets == []:
        yield Fault(
            ("method", "targets"), _("This list names no layer. Write all-linear, or names such as [q_proj, v_proj].")
        )
    for number, name in enumerate(targets if isinstance(targets, list) else []):
        if name in (targets or [])[:number] or not name.strip():
            yield Fault(("method", "targets", number), _("Each layer is named once, and none is empty."))


def the_base_suits_the_method(recipe: Recipe) -> Iterator[Fault]:
    """Weights of four or eight bits cannot learn; PiSSA begins with plain weights, LoftQ with quantised ones. PEFT
    draws orthogonal adapters in the base's own type, two halves at a time."""
    method, held, path = recipe.method, recipe.model.quantization, ("model", "quantization")
    if held != "none" and isinstance(method, Full):
        message = _("A quantised base cannot learn itself: take method lora, or quantization: none.")
        yield Fault(path, message, (("method", "name"),))
    if held != "none" and isinstance(method, Lora) and method.init == "pissa":
        message = _("pissa takes its adapters out of plain weights, and this base is quantised. Take loftq.")
        yield Fault(("method", "init"), message, (path,))
    if held == "none" and isinstance(method, Lora) and method.init == "loftq":
        message = _("loftq begins with what quantising the base loses. Set model.quantization to nf4.")
        yield Fault(("method", "init"), message, (path,))
    if isinstance(method, Lora) and method.init == "orthogonal":
        if held != "none":
            message = _("orthogonal begins beside plain weights, and this base is quantised. Take default or loftq.")
            yield Fault(("method", "init"), message, (path,))
        if method.rank % 2:
            message = _("orthogonal needs an even rank.")
            yield Fault(("method", "rank"), message, (("method", "init"),))


def virtual_tokens_stay_outside_the_weights(recipe: Recipe) -> Iterator[Fault]:
    """What stands before a conversation cannot be merged, so no file of weights can hold it."""
    if isinstance(recipe.method, PromptTuning | PrefixTuning) and recipe.export.formats:
        message = _(
            "What {method} learns lies outside the weights, so neither GGUF nor a merged model can hold it; "
            "afina chat and transformers with PEFT open its run folder. Write formats: []"
        )
        yield Fault(("export", "formats"), message.format(method=recipe.method.name), (("method", "name"),))
    if isinstance(recipe.method, PrefixTuning) and recipe.training.gradient_checkpointing:
        message = _("prefix-tuning keeps keys and values, which computing layers again would lose. Leave this out.")
        yield Fault(("training", "gradient_checkpointing"), message, (("method", "name"),))


def learnt_prompts_are_asked_plainly(recipe: Recipe) -> Iterator[Fault]:
    """Behind learnt prompts PEFT's own generate writes, which knows no grammar, and the likeliest tokens alone."""
    if not isinstance(recipe.method, PromptTuning | PrefixTuning):
        return
    for number, task in enumerate(recipe.tasks):
        if "tuned" not in recipe.evaluation.systems and task.name not in recipe.training.evaluate:
            continue
        asked = [("decide", task.decide == "constrained"), ("constrained", task.constrained)]
        for key, there in [*asked, ("temperature", task.temperature > 0)]:
            if there:
                message = _(
                    "What {method} learnt can be asked neither with a grammar nor with a temperature. Leave {key} out."
                )
                yield Fault(
                    ("tasks", number, key), message.format(method=recipe.method.name, key=key), (("method", "name"),)
                )


def an_adapter_alone_is_pairs_of_matrices(recipe: Recipe) -> Iterator[Fault]:
    """The format lora: llama.cpp adds low-rank pairs to a base, and nothing else."""
    method, path = recipe.method, ("export", "formats")
    if "lora" not in recipe.export.formats or isinstance(method, PromptTuning | PrefixTuning):
        return
    if isinstance(method, Full):
        message = _("A fully tuned model has no adapter of its own. Write merged instead of lora.")
        yield Fault(path, message, (("method", "name"),))
        return
    more: list[tuple[Path, bool]] = [
        (("method", "dora"), method.dora),
        (("method", "bias"), method.bias != "none"),
        (("method", "modules_to_save"), bool(method.modules_to_save)),
        (("model", "turn_tokens"), bool(recipe.model.turn_tokens)),
    ]
    for key, there in more:
        if there:
            message = _("llama.cpp adds pairs of matrices alone, and {key} makes more of it. Write merged, not lora.")
            yield Fault(path, message.format(key=".".join(map(str, key))), (key,))


UNKNOWN_BEGINNINGS = {"experts": ("orthogonal", "pissa", "loftq"), "router": ("loftq",)}
"""Ways to begin that look at a matrix of the base, where there is a stack of them, or one that is no layer."""


def adapters_of_parameters_are_plain(recipe: Recipe) -> Iterator[Fault]:
    """PEFT adds B A to the weights of experts and routers, so that there is no input to drop and no row to scale."""
    method = recipe.method
    if not isinstance(method, Lora):
        return
    for key in ("experts", "router"):
        if getattr(method, key) and method.dora:
            message = _("Adapters on experts or a router know no DoRA. Leave one of the two out.")
            yield Fault(("method", key), message, (("method", "dora"),))
        if getattr(method, key) and method.init in UNKNOWN_BEGINNINGS[key]:
            message = _("Adapters on experts or a router cannot begin as {init}. Take default or gaussian.")
            yield Fault(("method", "init"), message.format(init=method.init), (("method", key),))


def the_optimizer_suits_the_method(recipe: Recipe) -> Iterator[Fault]:
    """Muon makes the steps of a whole weight matrix orthogonal; adapters are factors of one."""
    if recipe.training.optimizer == "muon" and not isinstance(recipe.method, Full):
        message = _("muon is for whole matrices, that is for method full. Take adamw.")
        yield Fault(("training", "optimizer"), message, (("method", "name"),))


def turn_tokens_are_texts(recipe: Recipe) -> Iterator[Fault]:
    """Turn tokens are different texts without white space."""
    tokens = recipe.model.turn_tokens
    for number, text in enumerate(tokens):
        if len(text) < 2 or text != "".join(text.split()):
            yield Fault(
                ("model", "turn_tokens", number), _("A turn token has at least two characters and no white space.")
            )
        if text in tokens[:number]:
            yield Fault(("model", "turn_tokens", number), _("The turn token {text} stands twice.").format(text=text))


RULES: tuple[Rule, ...] = (
    turn_tokens_are_texts,
    mapping_goes_with_its_dialect,
    sources_are_named,
    places_are_named,
    encodings_are_known,
    labels_are_a_choice,
    task_keys_suit_their_kind,
    task_names_differ,
    tasks_while_training_are_tasks,
    warmup_fits_the_run,
    micro_batch_holds_a_sample,
    formats_differ,
    targets_are_named,
    the_base_suits_the_method,
    virtual_tokens_stay_outside_the_weights,
    learnt_prompts_are_asked_plainly,
    an_adapter_alone_is_pairs_of_matrices,
    adapters_of_parameters_are_plain,
    the_optimizer_suits_the_method,
)


def faults(recipe: Recipe) -> list[Fault]:
    """Every broken rule of a recipe whose keys are right one by one."""
    return [fault for rule in RULES for fault in rule(recipe)]


def _is_place(text: str) -> bool:
    return bool(text.strip()) and "\0" not in text


def _reads_text(encoding: str) -> bool:
    """Whether Python knows it and makes text with it; hex, rot13 and the like are codecs too, but not of text."""
    try:
        b"\n".decode(encoding)
    except UnicodeError:
        return True  # half a character of UTF-16
    except (LookupError, ValueError):
        return False
    return True
