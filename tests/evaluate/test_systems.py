"""Everyone who can be asked: a GGUF file says what its model says, a grammar has its way, an endpoint may fail."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from endpoint_server import completion
from gguf import GGUFReader
from journey.tiny import save_base, write_rows
from small import CPU

from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import ModelError, RecipeError
from afina.evaluate.systems.asking import Answer, Choose, Constraint, Read, Request, Write
from afina.evaluate.systems.endpoint import EndpointAnswering
from afina.evaluate.systems.gguf import GgufAnswering, Tree, Weighing
from afina.evaluate.systems.opening import Opening
from afina.evaluate.systems.transformer import ModelAnswering
from afina.evaluate.tasks.json_object import Json
from afina.export.gguf import write_gguf
from afina.model.endpoint import Endpoint
from afina.model.load import load_model
from afina.serve.speakers import GgufSpeaker

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "é"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
QUESTIONS = [
    "The soup is great.",
    "The film is dull.",
    "¿Y el café?",
    "no",
    "The garden is lovely, and so is the lamp.",
]


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def answers(system, requests: list[Request]) -> list[Answer]:
    found: dict[int, Answer] = {}
    system.answer(requests, found.__setitem__)
    return [found[place] for place in range(len(requests))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder) -> ModelAnswering:
    return ModelAnswering(load_model(str(folder), CPU), Renderer(load_tokenizer(str(folder))), CPU, nullcontext)


@pytest.fixture(scope="module")
def gguf(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(folder, file, "f32", name="m")
    with Weighing(file, cache="f32") as llama:
        yield GgufAnswering(llama, GgufSpeaker("", llama).prompt)


def test_a_gguf_file_chooses_reads_and_writes_as_its_model(model, gguf):
    labels = ("good", "bad", "niño", "a longer label")
    requests: list[Request] = []
    for question in QUESTIONS:
        requests += [Choose(asked(question), labels), Read(asked(question), "good café"), Write(asked(question), 12)]
    for ours, theirs in zip(answers(model, requests), answers(gguf, requests), strict=True):
        assert (theirs.text, theirs.tokens, theirs.ended, theirs.error) == (ours.text, ours.tokens, ours.ended, "")
        assert theirs.scores == pytest.approx(ours.scores, abs=2e-4)


def test_a_tree_asks_once_what_labels_share():
    tree = Tree([[1, 2, 9], [1, 3, 9], [4, 9]])
    assert tree.nexts == {(): {1, 4}, (1,): {2, 3}, (1, 2): {9}, (1, 3): {9}, (4,): {9}}


@pytest.mark.parametrize("who", ["model", "gguf"])
def test_a_constrained_answer_is_of_the_schema_or_a_label(who, request):
    system = request.getfixturevalue(who)
    found = answers(system, [Write(asked(text), 64, Constraint(schema=SCHEMA)) for text in QUESTIONS])
    assert who == "gguf" or all(answer.ended for answer in found)  # llama.cpp lets a weak model write blanks for ever
    for answer in found:
        if not answer.ended:
            continue
        jsonschema.validate(json.loads(answer.text), json.loads(SCHEMA))
    found = answers(system, [Write(asked(text), 64, Constraint(("good", "niño"))) for text in QUESTIONS])
    assert {answer.text for answer in found} <= {"good", "niño"} and all(answer.ended for answer in found)


def test_an_endpoint_answers_in_the_api_s_words(serve, monkeypatch):
    monkeypatch.setenv("AFINA_TEST_KEY", "hush")
    server = serve(lambda body: completion(body["messages"][-1]["content"].upper(), "length"))
    system = EndpointAnswering(Endpoint(server.url, "some-model", "AFINA_TEST_KEY"))
    found = answers(system, [Write(asked(text), 7) for text in QUESTIONS])
    assert [answer.text for answer in found] == [text.upper() for text in QUESTIONS]
    assert all(answer.tokens == 3 and not answer.ended for answer in found)
    seen = server.seen[0]
    assert (seen["path"], seen["key"]) == ("/v1/chat/completions", "Bearer hush")
    assert (seen["model"], seen["max_tokens"], seen["temperature"]) == ("some-model", 7, 0.0)


def test_an_endpoint_chooses_by_what_it_writes(serve):
    said = iter(['"Niño"', "GOOD.", "perhaps"])
    server = serve(lambda body: completion(next(said)))
    found = []
    for _time in range(3):  # one by one, so that the order is known
        found += answers(EndpointAnswering(Endpoint(server.url, "m")), [Choose(asked("?"), ("good", "niño"))])
    assert [answer.text for answer in found] == ["niño", "good", "perhaps"]
    assert "likely" in answers(EndpointAnswering(Endpoint(server.url, "m")), [Read(asked("?"), "x")])[0].error


@pytest.mark.parametrize(
    "status, content",
    [(200, b"no json"), (200, b"[]"), (200, b'{"choices": []}'), (400, b'{"error": {"message": "bad"}}'), (401, b"")],
)
def test_what_is_no_answer_is_told(serve, status, content):
    server = serve(lambda body: (status, content))
    (answer,) = answers(EndpointAnswering(Endpoint(server.url, "m", patience=())), [Write(asked("?"), 5)])
    assert "gave no answer" in answer.error and len(server.seen) == 1


@pytest.mark.parametrize("usage", [None, 5, [], {"completion_tokens": "many"}, {"completion_tokens": -3},
                                   {"completion_tokens": 10**30}, {"completion_tokens": None}])  # fmt: skip
def test_what_an_endpoint_cannot_have_counted_is_not_counted(serve, usage):
    content = {"choices": [{"message": {"content": "yes"}, "finish_reason": None}], "usage": usage}
    server = serve(lambda body: (200, json.dumps(content).encode()))
    (answer,) = answers(EndpointAnswering(Endpoint(server.url, "m", patience=())), [Write(asked("?"), 5)])
    assert (answer.text, answer.tokens, answer.ended, answer.error) == ("yes", 0, True, "")


@pytest.mark.parametrize("said", ["\ud800 good", json.dumps("\ud800 good")])
def test_half_a_character_from_an_endpoint_can_be_kept(serve, tmp_path, said):
    """JSON may escape half a character, which no file of ours can hold: as text, and as JSON in a text."""
    server = serve(lambda body: completion(said))
    system = EndpointAnswering(Endpoint(server.url, "m", patience=()))
    (answer,) = answers(system, [Write(asked("?"), 5, Constraint(("good", "bad")))])
    assert answer.text == "? good"
    refused = serve(lambda body: (400, json.dumps({"error": {"message": said}}).encode()))
    (answer,) = answers(EndpointAnswering(Endpoint(refused.url, "m", patience=())), [Write(asked("?"), 5)])
    answer.error.encode()


def test_ctrl_c_waits_for_no_endpoint(serve, tmp_path):
    """A real process asks an endpoint that never answers."""
    asked_of, never = threading.Event(), threading.Event()

    def hang(body: dict) -> tuple[int, bytes]:
        asked_of.set()
        never.wait(600)
        return completion("late")

    server = serve(hang)
    write_rows(tmp_path / "rows.jsonl", [(f"{number}?", "yes") for number in range(20)])
    tasks = "tasks:\n  - {name: t, kind: exact, data: rows.jsonl}\n"
    (tmp_path / "r.yaml").write_text(f"name: x\nmodel: {{base: bundled}}\ndata: {{train: rows.jsonl}}\n{tasks}")
    process = subprocess.Popen(
        [sys.executable, "-m", "afina", "eval", f"{server.url}#m", "--recipe", "r.yaml", "--out", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"},
    )
    try:
        assert asked_of.wait(300)
        process.send_signal(signal.SIGINT)
        _out, said = process.communicate(timeout=200)  # the endpoint is given 300 s, four times
        assert process.returncode == 130 and "Traceback" not in said
    finally:
        never.set()
        process.kill()
        process.wait()


def test_a_gguf_file_that_computes_no_number_has_no_answer(folder, tmp_path):
    write_gguf(folder, tmp_path / "m.gguf", "f32", name="m")
    reader = GGUFReader(tmp_path / "m.gguf", "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight").data[:] = np.nan
    reader.data.flush()
    with Weighing(tmp_path / "m.gguf", cache="f32") as llama:
        system = GgufAnswering(llama, GgufSpeaker("", llama).prompt)
        requests = [Choose(asked("?"), ("good", "bad")), Read(asked("?"), "good"), Write(asked("?"), 3)]
        assert [answer.error for answer in answers(system, requests)] == ["What the model computes is no number."] * 3


def test_what_is_temporary_is_tried_again(serve):
    states = iter([503, 429, 200])
    server = serve(lambda body: completion("at last") if (status := next(states)) == 200 else (status, b""))
    system = EndpointAnswering(Endpoint(server.url, "m", patience=(0.0, 0.0, 0.0)))
    assert answers(system, [Write(asked("?"), 5)])[0].text == "at last"


def test_an_endpoint_that_goes_away_is_asked_no_more():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", patience=(0.0, 0.0))
    found = answers(EndpointAnswering(endpoint), [Write(asked("?"), 5)] * 40)
    assert all(answer.error for answer in found) and endpoint._unreached < 40
    with pytest.raises(ModelError, match="went away"):
        endpoint.chat([], max_tokens=1)


def test_names_lead_to_systems(folder, tmp_path, monkeypatch):
    opening = Opening(tmp_path, lambda llama: GgufSpeaker("", llama).prompt)
    found = opening.systems([str(folder), str(folder), "http://somewhere:1/v1#m"], None)
    assert [system.name for system in found] == [folder.name, f"{folder.name}-2", "somewhere#m"]
    assert found[0].identity == found[1].identity
    with pytest.raises(RecipeError, match="no run"):
        opening.systems(["base"], None)
    with pytest.raises(ModelError), opening.other("nothing/there").open():
        pass


def test_a_schema_fetches_nothing_and_is_proved(tmp_path):
    from afina.recipe.schema import Task

    task = Task(name="t", kind="json", data="-", schema_file="s.json")
    for text in ("{", '{"type": 3}', "[]"):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(RecipeError, match=r"tasks\.schema_file cannot be read"):
            Json().prepare(task, [], tmp_path)
