"""Personalities in a chat: who is chosen answers as alone; loading, choosing and dropping by command."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import loud_llama, perturb_adapters

from afina.artifact import parent, seal, source_digest
from afina.console import Console
from afina.data.conversation import Message
from afina.errors import ModelError, RecipeError
from afina.model.saved import load_adapter, save_adapter
from afina.recipe.schema import Chat, Recipe
from afina.serve.opening import speakers_of
from afina.serve.personas import open_cast
from afina.serve.session import Session
from afina.serve.speakers import ModelSpeaker
from afina.serve.terminal import chat

ASKED = [Message("user", "What is a loop?")]
COLD = Chat(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A base and two adapters, each with a tokenizer of its own beside it."""
    place = tmp_path_factory.mktemp("personas")
    loud_llama().save_pretrained(place / "base")
    tokenizer.save(place / "base")
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    for seed, name in enumerate(("pirate", "poet")):
        torch.manual_seed(seed)  # PEFT draws A from the one state that all tests share
        model = perturb_adapters(get_peft_model(loud_llama(), config), seed + 5)
        save_adapter(model, place / name, base="x")
    tokenizer.save(place / "poet")
    return place


@pytest.fixture(scope="module")
def alone(place, renderer) -> dict[str, str]:
    models = {name: load_adapter(loud_llama(), place / name) for name in ("pirate", "poet")} | {"base": loud_llama()}
    return {
        name: ModelSpeaker(name, model, renderer).answer(ASKED, COLD, 0, lambda piece: None)
        for name, model in models.items()
    }


def opened(place: Path, *names: str):
    return open_cast(str(place / "base"), [f"{name}={place / name}" for name in names])[0]


def answer(cast) -> str:
    return cast.answer(ASKED, COLD, 0, lambda piece: None)


def test_each_answers_as_alone(place, alone):
    cast = opened(place, "pirate", "poet")
    assert len(set(alone.values())) == 3
    assert (cast.name, cast.names) == ("pirate", ("base", "pirate", "poet"))
    for name in ("pirate", "base", "poet", "pirate"):
        cast.choose(name)
        assert answer(cast) == alone[name] and cast.name == name
    cast.drop("pirate")
    assert (cast.name, answer(cast)) == ("base", alone["base"])
    cast.add("second", place / "poet")
    cast.choose("second")
    assert answer(cast) == alone["poet"]
    assert cast.length(ASKED) > 4


@pytest.mark.parametrize("text", ["pirate", "=x", "pirate=", "a/b=x", "ñ ñ=x"])
def test_a_pair_that_is_none(place, text):
    with pytest.raises(RecipeError):
        open_cast(str(place / "base"), [text])


def test_names_that_are_not_there(place):
    cast = opened(place, "pirate")
    for act in (cast.choose, cast.drop):
        with pytest.raises(ModelError, match="no personality called nobody"):
            act("nobody")
    for name in ("base", "pirate"):
        with pytest.raises(ModelError):
            cast.add(name, place / "poet")
    with pytest.raises(ModelError, match="cannot be dropped"):
        cast.drop("base")
    with pytest.raises(ModelError, match="holds no adapter"):
        cast.add("other", place)
    assert cast.names == ("base", "pirate")


def test_the_commands_of_a_talk(place, alone, monkeypatch, capsys):
    speakers, _settings, limit = speakers_of(str(place / "base"), False, [f"pirate={place / 'pirate'}"], None)
    lines = [
        "What is a loop?",
        "/persona base",
        "/reset",
        "What is a loop?",
        f"/persona poet={place / 'poet'}",
        "/reset",
        "What is a loop?",
        "/persona -poet",
        "/persona",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    session = Session(speakers, Chat(), limit=limit)
    session.change(**COLD.model_dump())  # as the command line does: it holds for all of them
    chat(session, Console())
    shown = capsys.readouterr().out
    for name in ("pirate", "base", "poet"):
        assert "".join(letter for letter in alone[name] if letter.isprintable() or letter == "\n").strip() in shown
    assert "[base], pirate, poet" not in shown and "base, pirate, [poet]" in shown and "[base], pirate" in shown


def test_a_chat_without_personalities_says_so(place, renderer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/persona poet\n"))
    with pytest.raises(RecipeError, match="one personality"):
        chat(Session([ModelSpeaker("x", loud_llama(), renderer)], COLD), Console())


def test_an_adapter_of_a_run_on_another_base_is_refused_by_its_hash(place, tmp_path):
    """Named by its run or by the folder inside; of the same base it answers, whatever the base was called then."""
    digests = {"right": source_digest(place / "base"), "wrong": "0" * 64}
    for name, digest in digests.items():
        run = tmp_path / name
        shutil.copytree(place / "pirate", run / "adapter")
        recipe = Recipe.model_validate({"name": name, "data": {"train": "x"}, "model": {"base": "elsewhere"}})
        base = parent("elsewhere", str(digest), "base")
        seal(run, "run", parents=[base], recipe=recipe.resolved(), recipe_folder=str(tmp_path))
        for given in (run, run / "adapter"):
            if name == "right":
                open_cast(str(place / "base"), [f"me={given}"])
            else:
                with pytest.raises(ModelError, match="another base, elsewhere"):
                    open_cast(str(place / "base"), [f"me={given}"])


def test_each_is_talked_to_as_its_run_says(place, tmp_path, monkeypatch, capsys):
    """What was changed by hand holds for all; the base and an adapter of no run have the defaults."""
    digest = str(source_digest(place / "base"))
    for name, said in (("short", {"max_new_tokens": 3}), ("long", {"max_new_tokens": 9, "system": "Sing."})):
        shutil.copytree(place / "pirate", tmp_path / name / "adapter")
        recipe = Recipe.model_validate({"name": name, "data": {"train": "x"}, "model": {"base": "b"}, "chat": said})
        recorded = [parent("b", digest, "base")]
        seal(tmp_path / name, "run", parents=recorded, recipe=recipe.resolved(), recipe_folder=str(tmp_path))
    given = [f"short={tmp_path / 'short'}", f"long={tmp_path / 'long' / 'adapter'}", f"poet={place / 'poet'}"]
    (cast,), settings, limit = speakers_of(str(place / "base"), False, given, None)
    session, seen = Session([cast], settings, limit=limit), []
    session.change(temperature=0.0)
    seen.append(session.settings)
    monkeypatch.setattr(
        session, "go_on_with", lambda new, go_on=session.go_on_with: (go_on(new), seen.append(session.settings))
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("/persona long\n/persona poet\n/persona base\n/persona short\n"))
    chat(session, Console())
    assert [(one.max_new_tokens, one.system, one.temperature) for one in seen] == [
        (3, None, 0.0),
        (9, "Sing.", 0.0),
        (Chat().max_new_tokens, None, 0.0),
        (Chat().max_new_tokens, None, 0.0),
        (3, None, 0.0),
    ]
