"""Answers held to a JSON Schema, place by place."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample, packed
from afina.data.problem import BadRows
from afina.data.targets import check_targets, read_schema, validator
from afina.errors import RecipeError

pytest.importorskip("jsonschema", reason='install "afina[eval]" to hold answers to a schema')
BOT = {
    "type": "object",
    "required": ["bot_name", "dialog_flow"],
    "additionalProperties": False,
    "properties": {
        "bot_name": {"type": "string", "minLength": 1},
        "dialog_flow": {"type": "array", "items": {"type": "object", "required": ["say"]}},
    },
}
GOOD = {"bot_name": "Ana", "dialog_flow": [{"say": "Hola"}]}


def sample(*answers: object, line: int = 1, **more: object) -> Sample:
    messages = []
    for answer in answers:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        messages += [Message("user", "A bot?"), Message("assistant", text, **more)]
    return Sample(tuple(messages), Path("bots.jsonl"), line)


def faults(*samples: Sample) -> list[tuple[int, str]]:
    try:
        check_targets(samples, json.dumps(BOT))
    except BadRows as bad:
        return [(problem.line, problem.reason) for problem in bad.problems]
    return []


def test_each_violation_has_its_line_and_place():
    assert faults(sample(GOOD), sample(GOOD, GOOD, line=2)) == []
    found = faults(
        sample(GOOD),
        sample("Sure! Here it is.", line=2),
        sample({**GOOD, "bot_name": ""}, line=3),
        sample({**GOOD, "dialog_flow": [{"say": "a"}, {"do": 1}]}, line=4),
        sample({"bot_name": "Ana"}, line=5),
        sample('{"bot_name": NaN}', line=6),
        sample(GOOD, [1], line=7),
    )
    assert [line for line, _reason in found] == [2, 3, 4, 5, 6, 7]
    assert "not JSON" in found[0][1] and "not JSON" in found[4][1]
    assert "$.bot_name" in found[1][1] and "$.dialog_flow[1]" in found[2][1] and "dialog_flow" in found[3][1]


def test_what_is_not_learnt_is_not_held_to_it():
    assert faults(sample("words", weight=0.0)) == []
    call = packed({"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]})
    assert faults(sample("", more=call)) == []


@given(
    st.dictionaries(
        st.sampled_from(["bot_name", "dialog_flow", "x"]),
        st.none() | st.text(max_size=2) | st.lists(st.just({"say": 1}), max_size=2),
    )
)
def test_it_is_jsonschemas_verdict(value):
    assert (faults(sample(value)) == []) == validator(json.dumps(BOT)).is_valid(value)


def test_schemas_that_are_none(tmp_path):
    for text in ("{", '{"type": "odd"}', "[" * 100_000, '{"required": 7}'):
        (tmp_path / "s.json").write_text(text, "utf-8")
        with pytest.raises(RecipeError, match=r"data\.schema_file"):
            read_schema(tmp_path / "s.json", "data.schema_file")
    with pytest.raises(RecipeError):
        read_schema(tmp_path / "none.json", "data.schema_file")


def test_a_reference_to_elsewhere_is_not_fetched(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_arguments: pytest.fail("connected"))
    schema = json.dumps({"$ref": "https://json-schema.org/elsewhere.json"})
    with pytest.raises(BadRows, match="cannot be applied"):
        check_targets([sample(GOOD)], schema)
