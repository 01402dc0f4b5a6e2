"""json: what the model writes is read as JSON, held to a schema, and compared field by field."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.data.targets import read_schema, validator
from afina.errors import DataError
from afina.evaluate.metrics import wilson
from afina.evaluate.systems.asking import Answer, Constraint, Request, Write
from afina.evaluate.tasks.kind import CUT_OFF, EMPTY, NOT_JSON, NOT_OBJECT, NOT_SCHEMA, Asked, Mark, one_each
from afina.language import _
from afina.recipe.place import schema_file
from afina.recipe.schema import Task

NOTHING = object()
"""What a text holds that is no JSON object, or has not the field asked for. A field may be null, which is something."""


class Json:
    """JSON by what it means, not by how it is written."""

    measure, reads = "accuracy", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Each reference must be JSON with the field; the schema must be one."""
        for sample in samples:
            if field_of(sample.answer, task.field) is NOTHING:
                raise DataError(
                    _("The reference answer of task {task} is not JSON with the field {field}.").format(
                        task=task.name, field=task.field or "-"
                    ),
                    file=sample.file,
                    line=sample.line,
                )
        return Asked(task, samples, schema=_schema(task, folder), folder=folder)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One answer; constrained where the task says so."""
        constraint = Constraint(schema=asked.schema or "{}") if asked.task.constrained else None
        return [Write(asked.samples[place].prompt, asked.task.max_new_tokens, constraint)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Right: the field, or the whole object, equals the reference's."""
        valid = None if asked.schema is None else validator(asked.schema)

        def one(sample: Sample, answer: Answer) -> Mark:
            found, wanted = field_of(answer.text, asked.task.field), field_of(sample.answer, asked.task.field)
            right = found is not NOTHING and same(found, wanted)
            value = field_of(answer.text, None)
            problem = _problem(answer, value, valid)
            truth = field_of(sample.answer, None)
            fields = {
                key: value is not NOTHING and key in value and same(value[key], truth[key])
                for key in (truth if isinstance(truth, dict) else {})
            }
            return Mark(right, float(right), answer.text, problem, {"parsed": value is not NOTHING, "fields": fields})

        return one_each(one, asked, places, answers)

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """How many are JSON objects, how many of the schema, and how many of each field are right."""
        names = dict.fromkeys(key for mark in marks for key in mark.more["fields"])
        counts = {name: [mark.more["fields"][name] for mark in marks if name in mark.more["fields"]] for name in names}
        parsed = sum(mark.more["parsed"] for mark in marks)
        found: dict[str, Any] = {"parsed": parsed}
        if asked.schema is not None:
            found["of_schema"] = parsed - sum(mark.problem == NOT_SCHEMA for mark in marks)
        found["fields"] = {
            name: {"right": sum(right), "of": len(right), "interval": list(wilson(sum(right), len(right)))}
            for name, right in counts.items()
        }
        return found


def _problem(answer: Answer, value: Any, valid: Any) -> str:
    if not answer.text.strip():
        return EMPTY
    if value is NOTHING:
        if _loads(answer.text) is not NOTHING:
            return NOT_OBJECT
        return NOT_JSON if answer.ended else CUT_OFF
    return "" if valid is None or valid.is_valid(value) else NOT_SCHEMA


def _schema(task: Task, folder: Path) -> str | None:
    """The schema's text, proved to be one."""
    return None if task.schema_file is None else read_schema(schema_file(task.schema_file, folder), "tasks.schema_file")


def field_of(text: str, field: str | None) -> Any:
    """A top-level field of a JSON object, the whole object without one, or NOTHING."""
    value = _loads(text)
    if not isinstance(value, dict):
        return NOTHING
    return value if field is None else value.get(field, NOTHING)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOTHING


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values. To Python true equals 1, inside lists and objects too; to JSON it does not."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)
