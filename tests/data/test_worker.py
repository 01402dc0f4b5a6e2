"""Hostile templates, patterns and tokenizer.json: a typed error within a second of work, and we are alive."""

import json
import os

import pytest
from data.byte_level import build
from tokenizers import Tokenizer as Backend

from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.data.patterns import KNOWN, MAX_TOKENS, check_tokenizer
from afina.data.template import Renderer
from afina.data.tokenizer import Refusal, Tokenizer
from afina.data.worker import WORKER, Overrun
from afina.errors import ModelError

ASKED = [[{"role": "user", "content": "x"}], False, {}]
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (FOREVER, "1 s"),
        ("{{ 'a' * 2000000000 }}", "MiB"),  # while it is compiled
        ("{% set n = 2000000000 %}{{ messages[0].content * n }}", "MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "characters"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "MiB",
        ),
        ("{{ messages[0].content|center(3000000000) }}", "MiB"),
    ],
)
def test_a_template_that_takes_too_much_is_stopped(template, why):
    with pytest.raises(Overrun, match=why):
        WORKER.ask("template", template, [ASKED])
    assert WORKER.ask("template", "{{ messages[0].content }}", [ASKED]) == [("made", "x")]


def test_a_renderer_says_it_in_one_sentence():
    with pytest.raises(ModelError, match="was stopped") as raised:
        Renderer(Tokenizer(build(), FOREVER)).prompt([Message("user", "x")])
    assert raised.value.hint and not isinstance(raised.value, Refusal)


def test_long_conversations_may_be_long():
    text = "word " * 500_000
    assert WORKER.ask("template", "{{ messages[0].content }}", [[[{"content": text}], False, {}]]) == [("made", text)]


def test_many_at_once_come_back_in_order():
    items = [[[{"content": f"{n} \ud800 ñ 🙂"}], n % 2 == 0, {"tools": None}] for n in range(1000)]
    template = "{{ messages[0].content }}{{ add_generation_prompt }}"
    answers = WORKER.ask("template", template, items)
    assert answers == [("made", f"{n} \ud800 ñ 🙂{n % 2 == 0}") for n in range(1000)]


def test_a_fork_has_a_process_of_its_own():
    WORKER.ask("template", "{{ 1 }}", [ASKED])
    child = os.fork()
    if child == 0:
        good = WORKER.ask("template", "{{ messages[0].content }}", [ASKED]) == [("made", "x")]
        WORKER.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert WORKER.ask("template", "{{ 1 }}", [ASKED]) == [("made", "1")]


def test_a_process_that_is_killed_is_begun_again():
    WORKER.ask("template", "{{ 1 }}", [ASKED])
    WORKER._process.kill()
    WORKER._process.wait()
    assert WORKER.ask("template", "{{ 1 }}", [ASKED]) == [("made", "1")]


def saved(folder, **changes):
    build(eos="</s>").save_pretrained(folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_bytes())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(definition.get(key), dict):
            definition[key] |= value
        else:
            definition[key] = value
    file.write_text(json.dumps(definition), "utf-8")
    return str(folder)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", r"\s+$", "a{1000}{1000}{1000}"])
def test_a_pattern_that_explodes_is_refused_before_it_is_opened(pattern, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json of .* is refused: a pattern"):
        load_tokenizer(saved(tmp_path, pre_tokenizer=split(pattern)))


@pytest.mark.parametrize("pattern", sorted(KNOWN))
def test_known_patterns_are_patterns(pattern, tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, pre_tokenizer=split(pattern)))
    assert tokenizer.encode(["It's 1234 ñ\n\n  x"])


def test_a_harmless_pattern_of_its_own_is_tried_and_taken(tmp_path):
    assert load_tokenizer(saved(tmp_path, pre_tokenizer=split(r" ?[\p{L}']+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"type": "Lua"}}, "its model"),
        ({"model": {"vocab": None}}, "no vocabulary"),
        ({"model": {"vocab": {"a": -1}}}, "ids is -1"),
        ({"model": {"vocab": {"a": MAX_TOKENS}}}, "ids is"),
        ({"model": {"vocab": {"a": "1"}}}, "ids is 1"),
        ({"added_tokens": [{"content": "<x>", "id": None}]}, "ids is None"),
        ({"added_tokens": [{"content": 7, "id": 7}]}, "no text"),
        ({"added_tokens": {}}, None),
        ({"added_tokens": "x"}, "added_tokens"),
        ({"model": {"byte_fallback": True, "vocab": {"<0x-1>": 0}}}, "no byte"),
    ],
)
def test_shapes_that_are_refused(changes, why, tmp_path):
    folder = saved(tmp_path, **changes)
    if why is None:
        return
    with pytest.raises(ModelError, match=why):
        load_tokenizer(folder)


def test_files_that_are_no_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    for content in (b"", b"[", b"[" * 200_000, b"[]", b'{"model": 1}', b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="refused"):
            check_tokenizer(file, "here")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError, match="refused"):
        check_tokenizer(file, "here")


@pytest.mark.real
@pytest.mark.parametrize("name", ["tokenizers/gpt-2", "tokenizers/phi-3", "models/stories260K"])
def test_real_tokenizers_need_no_trial(name, real_data, monkeypatch):
    monkeypatch.setattr(WORKER, "ask", lambda *_arguments: pytest.fail("tried"))
    check_tokenizer(real_data / name / "tokenizer.json", name)
    assert Backend.from_file(str(real_data / name / "tokenizer.json"))
