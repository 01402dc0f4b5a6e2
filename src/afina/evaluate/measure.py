"""Tasks put to systems: answers gathered, marked, counted, compared. Knows neither runs nor files of results."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.evaluate.answers import Answers, Clock, gather, rounds
from afina.evaluate.compare import compare, pairs_of
from afina.evaluate.metrics import bootstrap, shares
from afina.evaluate.systems.asking import Answer, Continue, Request, System, Write
from afina.evaluate.tasks.classification import Classification
from afina.evaluate.tasks.code import Code
from afina.evaluate.tasks.exact import Exact
from afina.evaluate.tasks.forgetting import Forgetting, general_questions
from afina.evaluate.tasks.json_object import Json
from afina.evaluate.tasks.judge import Judging, both_orders, judged
from afina.evaluate.tasks.kind import Asked, Kind, Mark, problems
from afina.evaluate.tasks.lm_eval import LmEval, own_samples
from afina.evaluate.tasks.maths import Maths
from afina.evaluate.tasks.perplexity import Perplexity
from afina.evaluate.tasks.similarity import Similarity
from afina.language import _
from afina.recipe.schema import Task

KINDS: dict[str, Kind] = {
    "classification": Classification(),
    "exact": Exact(),
    "maths": Maths(),
    "json": Json(),
    "code": Code(),
    "similarity": Similarity(),
    "perplexity": Perplexity(),
    "judge": Judging(),
    "forgetting": Forgetting(),
    "lm-eval": LmEval(),
}
OWN: dict[str, Callable[[Task, Path], list[Sample]]] = {
    "forgetting": lambda task, folder: general_questions()[0],
    "lm-eval": own_samples,
}
"""Kinds that bring their own samples."""
ROUND = 32
"""Samples asked between two looks at the clock."""

Progress = Callable[[float], None]


def prepare(task: Task, samples: Sequence[Sample], seed: int, folder: Path = Path()) -> Asked:
    """Choose the samples of a task and check their references. Raises DataError for answers it cannot mark."""
    chosen = OWN[task.kind](task, folder) if task.kind in OWN else list(samples)
    if task.limit is not None and task.limit < len(chosen):
        salt = f"task {task.name} {seed}"
        chosen = sorted(chosen, key=lambda sample: sample.digest(salt))[: task.limit]
    return KINDS[task.kind].prepare(task, chosen, folder)


def work(asked: Asked, systems: int = 1) -> int:
    """Units of progress that asking so many systems takes, the judge included."""
    return len(asked.samples) * (systems + (max(0, systems - 1) if asked.task.kind == "judge" else 0))


@dataclass
class Taken:
    """What one system made of one task: per sample its answers and its mark, None where it gave none. `writes`: the
    samples that it answered in its own words; `verdicts`: what a judge said of these beside the first system's, in both
    orders; `unmarked`: why an answer has no mark."""

    answers: list[list[Answer] | None]
    marks: list[Mark | None] = field(default_factory=list)
    writes: set[int] = field(default_factory=set)
    verdicts: dict[int, tuple[Answer, Answer]] = field(default_factory=dict)
    unmarked: dict[int, str] = field(default_factory=dict)

    def given(self, place: int) -> str | None:
        """The answer to one sample, the first of several; None where there is none."""
        answers = self.answers[place]
        return answers[0].text if answers and not answers[0].error else None

    def written(self, place: int) -> int:
        """Tokens of the answer to one sample, the first of several; 0 where none was written."""
        given = self.answers[place] if place in self.writes else None
        return given[0].tokens if given and not given[0].error else 0


@dataclass
class Sitting:
    """One evaluation under way. `open_judge` makes the judge that a task names. `beside` are its results: a Taken for
    each task and system."""

    systems: Sequence[System]
    tasks: Sequence[Asked]
    answers: Answers
    on_progress: Progress = lambda done: None
    clock: Clock = field(default_factory=lambda: Clock(None))
    open_judge: Callable[[Task], System] | None = None
    beside: list[dict[str, Taken]] = field(default_factory=list)

    def ask(self) -> None:
        """Have every system answer every task, system after system; within a limit of time, round after round."""
        self.beside = [
            {system.name: Taken([None] * len(asked.samples)) for system in self.systems} for asked in self.tasks
        ]
        if not self.clock.limited:
            for system in self.systems:
                with ExitStack() as opened:
                    held = _held_open(system, opened)
                    for number, asked in enumerate(self.tasks):
                        self._one(number, asked, held, range(len(asked.samples)))
            for number, asked in enumerate(self.tasks):
                with ExitStack() as opened:
                    self._judge(number, self._judge_of(asked, opened), range(len(asked.samples)))
            return
        with ExitStack() as opened:
            held_open = [_held_open(system, opened) for system in self.systems]
            for number, asked in enumerate(self.tasks):
                judge = self._judge_of(asked, opened)
                for places in rounds(len(asked.samples), True, ROUND):
                    if self.clock.is_over():
                        self.on_progress(len(places) * work(asked, len(self.systems)) / len(asked.samples))
                        continue
                    for system in held_open:
                        self._one(number, asked, system, places)
                    self._judge(number, judge, places)

    def _judge_of(self, asked: Asked, opened: ExitStack) -> System | None:
        """Who judges a task; None where nobody does, or there is nothing to compare."""
        if asked.task.kind != "judge" or self.open_judge is None or len(self.systems) < 2:
            return None
        return _held_open(self.open_judge(asked.task), opened)

    def _judge(self, number: int, judge: System | None, places: range) -> None:
        """Have the judge compare everyone's answers with the first system's, in both orders."""
        if judge is None:
            return
        asked, beside = self.tasks[number], self.beside[number]
        first, *others = (beside[system.name] for system in self.systems)
        for taken in others:
            pairs = {place: (first.given(place), taken.given(place)) for place in places}
            whole = [(place, *pair) for place, pair in pairs.items() if None not in pair]
            requests = [
                request for place, one, two in whole for request in both_orders(asked, place, str(one), str(two))
            ]
            self.on_progress(len(places) - len(whole))
            with ExitStack() as opened:
                found = gather(judge, requests, self.answers, opened, lambda new: self.on_progress(0.5))
            for at, (place, *_texts) in enumerate(whole):
                taken.verdicts[place] = found[2 * at], found[2 * at + 1]

    def _one(self, number: int, asked: Asked, system: System, places: range) -> None:
        kind, taken = KINDS[asked.task.kind], self.beside[number][system.name]
        requests = [kind.requests(asked, place) for place in places]
        flat: list[Request] = [request for several in requests for request in several]
        share = len(places) / max(1, len(flat))
        with ExitStack() as opened:
            found = iter(gather(system, flat, self.answers, opened, lambda new: self.on_progress(share)))
        for place, several in zip(places, requests, strict=True):
            taken.answers[place] = [next(found) for _request in several]
            if any(isinstance(request, Write | Continue) for request in several):
                taken.writes.add(place)

    def results(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Mark, count and compare: the figures of every task, and a row a sample."""
        tasks, rows = [], []
        for asked, beside in zip(self.tasks, self.beside, strict=True):
            for number, taken in enumerate(beside.values()):
                _mark(asked, taken, compared=asked.task.kind == "judge" and number > 0)
            tasks.append(self._result(asked, beside))
            rows += _rows(asked, beside)
        return tasks, rows

    def _result(self, asked: Asked, beside: dict[str, Taken]) -> dict[str, Any]:
        figures = {system.name: _figures(asked, beside[system.name], system) for system in self.systems}
        pairs = [
            compare(before, after, beside[before].marks, beside[after].marks)
            for before, after in pairs_of([system.name for system in self.systems])
        ]
        result: dict[str, Any] = {
            "name": asked.task.name,
            "kind": asked.task.kind,
            "measure": next(
                (one["measure"] for one in figures.values() if "measure" in one), KINDS[asked.task.kind].measure
            ),
            "samples": len(asked.samples),
            "systems": figures,
            "comparisons": pairs,
        }
        if pairs:  # the first pair is the one that most readers want: base and tuned
            keys = ("fixed", "broken", "p_value", "verdict")
            result |= {key: pairs[0][key] for key in keys if key in pairs[0]}
        return result


def _held_open(system: System, opened: ExitStack) -> System:
    """The same system, which stays open from its first new question until `opened` is closed."""
    state: list[Any] = []

    class _Kept:
        def __enter__(self) -> Any:
            if not state:
                state.append(opened.enter_context(system.open()))
            return state[0]

        def __exit__(self, *exception: object) -> None:
            return None

    return System(system.name, system.kind, system.identity, _Kept, system.facts, system.reads)


def _mark(asked: Asked, taken: Taken, *, compared: bool) -> None:
    """Mark every answer; where it is `compared`, by the judge's verdicts, without which there is no mark."""
    given = {
        place: answers
        for place, answers in enumerate(taken.answers)
        if answers and not any(answer.error for answer in answers)
    }
    marks = KINDS[asked.task.kind].mark(asked, list(given), list(given.values()))
    found = dict(zip(given, marks, strict=True))
    taken.marks = [found.get(place) for place in range(len(asked.samples))]
    for place, mark in enumerate(taken.marks if compared else []):
        if mark is None:
            continue
        said = (
            judged(mark, *taken.verdicts[place]) if place in taken.verdicts else _("there was nothing to compare with")
        )
        taken.marks[place] = said if isinstance(said, Mark) else None
        if isinstance(said, str):
            taken.unmarked[place] = said


def _figures(asked: Asked, taken: Taken, system: System) -> dict[str, Any]:
    """The figures of one system: the main one with its interval, problems, time, and the kind's own."""
    places = [place for place, mark in enumerate(taken.marks) if mark is not None]
    marks = [mark for mark in taken.marks if mark is not None]
    given = [answer for answers in taken.answers if answers for answer in answers]
    errors = [*(answer.error for answer in given if answer.error), *taken.unmarked.values()]
    unasked = sum(answers is None for answers in taken.answers)
    seconds, tokens = sum(answer.seconds for answer in given), sum(answer.tokens for answer in given)
    told = sum(not answer.error for answer in given)
    figures: dict[str, Any] = {
        "answered": len(marks),
        "unanswered": len(asked.samples) - len(marks) - unasked,
        "unasked": unasked,
        "reasons": sorted(set(errors))[:5],
        "problems": problems(marks),
        "seconds": seconds,
        "samples_per_second": told / seconds if seconds and told else None,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds and told else None,
        **system.facts(),
    }
    if marks and all(mark.right is not None for mark in marks):
        counted = shares([bool(mark.right) for mark in marks])
        figures |= {"value": counted["accuracy"], **counted}
    elif marks:
        figures["value"] = sum(mark.score for mark in marks) / len(marks)
    else:
        figures["value"] = None
    if marks:
        figures |= KINDS[asked.task.kind].figures(asked, places, marks)
    if "interval" not in figures:  # scores from 0 to 1; other kinds of scores have an interval of their own
        figures["interval"] = bootstrap([mark.score for mark in marks])
    if lengths := sorted(filter(None, map(taken.written, range(len(asked.samples))))):
        middle = lengths[len(lengths) // 2]
        figures["lengths"] = {"mean": sum(lengths) / len(lengths), "median": middle, "longest": lengths[-1]}
    return figures


def _rows(asked: Asked, beside: dict[str, Taken]) -> list[dict[str, Any]]:
    rows = []
    for place, sample in enumerate(asked.samples):
        marks = {name: taken.marks[place] for name, taken in beside.items()}
        row: dict[str, Any] = {
            "task": asked.task.name,
            "sample": place,
            "where": sample.where,
            "prompt": sample.prompt[-1].content if sample.prompt else "",
            "expected": sample.answer.strip(),
        }
        if len(sample.prompt) > 1:
            row["before"] = [{"role": message.role, "content": message.content} for message in sample.prompt[:-1]]
        row |= {name: mark.shown for name, mark in marks.items() if mark is not None}
        row["right"] = {name: mark.right for name, mark in marks.items() if mark is not None}
        row["scores"] = {name: round(mark.score, 6) for name, mark in marks.items() if mark is not None}
        row["problems"] = {name: mark.problem for name, mark in marks.items() if mark is not None and mark.problem}
        row["tokens"] = {name: taken.written(place) for name, taken in beside.items() if taken.written(place)}
        row["unanswered"] = {
            name: taken.unmarked.get(place)
            or (taken.answers[place] or [Answer(error=_("not asked: the time was up"))])[0].error
            for name, taken in beside.items()
            if taken.marks[place] is None
        }
        rows.append({key: value for key, value in row.items() if value not in ({}, None)})
    return rows
