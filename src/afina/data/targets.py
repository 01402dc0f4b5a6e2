"""Answers that must be JSON of a JSON Schema: every one in the data is held to it before anything is learnt."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from afina.data.audit.letters import Fault
from afina.data.conversation import Sample
from afina.data.problem import BadRows, Problem
from afina.errors import RecipeError, ResourceError
from afina.language import _

MAX_BYTES = 2**22
SHOWN = 3
"""Violations told of one answer."""


def read_schema(file: Path, key: str) -> str:
    """The text of a schema, proved to be one. `key` names it in the recipe. Raises RecipeError, ResourceError."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(_("it is larger than {size} MiB").format(size=MAX_BYTES >> 20))
        text = file.read_text("utf-8")
        validator(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            _("The schema of {key} cannot be read: {reason}").format(key=key, reason=str(error).split("\n")[0]),
            hint=_("{key} names a file with a JSON Schema.").format(key=key),
            file=file,
        ) from error
    return text


def validator(schema: str) -> Any:
    """A validator of the schema. It fetches nothing: a reference to elsewhere is an error when it is met.

    Raises ValueError for a text that is no schema, ResourceError where the package is missing.
    """
    try:
        import jsonschema
        from jsonschema.validators import SPECIFICATIONS  # type: ignore[attr-defined]
    except ImportError as error:
        raise ResourceError(
            _("Holding answers to a schema needs the package jsonschema, which is not installed."),
            hint=_('Run: pip install "afina[eval]"'),
        ) from error
    value = json.loads(schema)
    kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(value)
    except jsonschema.SchemaError as error:
        raise ValueError(error.message) from error
    return kind(value, registry=SPECIFICATIONS)  # the default one asks the network


def check_targets(samples: Sequence[Sample], schema: str) -> None:
    """Hold every answer to the schema. Raises BadRows naming file, line and place of what is wrong."""
    valid = validator(schema)
    problems = [Problem(sample.file, sample.line, fault) for sample in samples for fault in _of(sample, valid)]
    if problems:
        raise BadRows(problems, len(samples), hint=_("Mend these answers, or the schema (data.schema_file)."))


class Targets:
    """What the audit asks about the answers of a recipe with a schema. `files`: those that are learnt or validated on;
    tasks have schemas of their own."""

    def __init__(self, schema: str, files: Collection[Path]) -> None:
        self._valid, self._files = validator(schema), frozenset(files)

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[int, Fault]]:
        """Place and fault of every answer that breaks the schema."""
        for at, sample in enumerate(samples):
            for fault in _of(sample, self._valid) if sample.file in self._files else ():
                yield at, Fault("schema-misfit", 0, 0, fault)


def _of(sample: Sample, valid: Any) -> Iterator[str]:
    for message in sample.messages:
        if message.role == "assistant" and message.weight > 0 and "tool_calls" not in message.details:
            yield from _faults(message.content, valid)


def _faults(answer: str, valid: Any) -> list[str]:
    """What is wrong with one answer, place by place."""
    from referencing.exceptions import Unresolvable  # comes with jsonschema

    try:
        value = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return [_("the answer is not JSON: {reason}").format(reason=str(error)[:80])]
    try:
        errors = sorted(valid.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    except (Unresolvable, ValueError, RecursionError) as error:
        return [_("the schema cannot be applied: {reason}").format(reason=str(error)[:80])]
    return [
        _("the answer breaks the schema at {place}: {reason}").format(place=error.json_path, reason=error.message[:120])
        for error in errors[:SHOWN]
    ]


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
