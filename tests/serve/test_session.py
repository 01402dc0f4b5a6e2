"""Turns, memory, settings and interruption, with scripted speakers and with a real model."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serve.scripted import Echo
from torch import nn

from afina.data.conversation import Message
from afina.data.template import Renderer
from afina.errors import DataError
from afina.recipe.schema import Chat
from afina.serve.session import Reply, Session
from afina.serve.speakers import ModelSpeaker


def contents(messages: tuple[Message, ...]) -> list[str]:
    return [message.content for message in messages]


def test_each_speaker_keeps_its_own_conversation() -> None:
    base, tuned = Echo("base"), Echo("tuned")
    session = Session([base, tuned], Chat())
    assert session.ask("one") == [Reply("base", "one (base)"), Reply("tuned", "one (tuned)")]
    session.ask("two")
    assert contents(base.heard[1]) == ["one", "one (base)", "two"]
    assert contents(tuned.heard[1]) == ["one", "one (tuned)", "two"]
    assert [message.role for message in session.history(1)] == ["user", "assistant"] * 2


def test_pieces_come_under_their_speakers_name() -> None:
    seen: list[tuple[str, str]] = []
    replies: list[Reply] = []
    Session([Echo("base"), Echo("tuned")], Chat()).ask("a b", lambda *piece: seen.append(piece), replies.append)
    for name in ("base", "tuned"):
        pieces = [piece for speaker, piece in seen if speaker == name]
        assert pieces[0] == "", "the empty piece says that the speaker begins"
        assert "".join(pieces) == f"a b ({name})"
    assert [reply.name for reply in replies] == ["base", "tuned"]


def test_system_and_reset() -> None:
    echo = Echo()
    session = Session([echo], Chat(system="Be brief."), seed=7)
    session.ask("one")
    session.ask("two")
    session.reset()
    session.ask("three")
    assert contents(echo.heard[2]) == ["Be brief.", "three"]
    session.set_system("Habla español.")
    assert session.history() == ()
    session.ask("four")
    assert echo.heard[3] == (Message("system", "Habla español."), Message("user", "four"))
    session.set_system("")
    session.ask("five")
    assert contents(echo.heard[4]) == ["five"]
    assert echo.seeds == [7, 8, 7, 7, 7]


def test_settings_are_checked_as_the_recipes_are() -> None:
    echo = Echo()
    session = Session([echo], Chat())
    session.change(temperature=0.0, top_p=0.5)
    session.ask("one")
    assert (echo.settings[0].temperature, echo.settings[0].top_p) == (0.0, 0.5)
    for wrong in ({"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError):
            session.change(**wrong)
    assert session.settings.top_p == 0.5


def test_oldest_turns_are_forgotten() -> None:
    echo = Echo()
    session = Session([echo], Chat(system="s", max_new_tokens=10), limit=24)  # the system message takes 2 tokens
    forgotten = [session.ask(f"a b c {n}")[0].forgotten for n in range(6)]  # a question 5, a turn 11
    assert forgotten[0] == 0 and sum(forgotten) >= 3
    for n, heard in enumerate(echo.heard):
        assert heard[0] == Message("system", "s")
        assert heard[1].role == "user", "a conversation begins with a question"
        assert heard[-1].content == f"a b c {n}"
        assert echo.length(heard) + echo.settings[n].max_new_tokens <= 24


def test_a_long_max_new_tokens_does_not_cost_the_memory() -> None:
    echo = Echo()
    session = Session([echo], Chat(max_new_tokens=512), limit=40)
    session.ask("a b")
    session.ask("c d")
    assert len(echo.heard[1]) == 3
    assert [settings.max_new_tokens for settings in echo.settings] == [37, 40 - 3 - 4 - 3]


def test_too_long_a_question_leaves_the_session_as_it_was() -> None:
    session = Session([Echo()], Chat(max_new_tokens=5), limit=12)
    session.ask("one")
    before = session.history()
    with pytest.raises(DataError, match=r"16 tokens long.*echo takes 12"):
        session.ask("word " * 15)
    assert session.history() == before
    assert session.ask("two")[0].text == "two (echo)"


def interrupt_at(count: int) -> object:
    calls = 0

    def on_text(_name: str, _piece: str) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            signal.raise_signal(signal.SIGINT)

    return on_text


def test_ctrl_c_stops_the_answer_and_keeps_the_session() -> None:
    base, tuned = Echo("base"), Echo("tuned")
    session = Session([base, tuned], Chat())
    replies = session.ask("a b c", interrupt_at(3))  # type: ignore[arg-type]
    assert replies == [Reply("base", "a b ", stopped=True), Reply("tuned", "a b c (tuned)")]
    session.ask("more")
    assert contents(base.heard[1]) == ["a b c", "a b ", "more"]


def test_an_answer_stopped_before_its_first_word_was_not_given() -> None:
    session = Session([Echo()], Chat())
    assert session.ask("a b c", interrupt_at(1)) == [Reply("echo", "", stopped=True)]  # type: ignore[arg-type]
    assert session.history() == ()


def test_what_a_listener_raises_leaves_the_conversation_as_before() -> None:
    session = Session([Echo("base"), Echo("tuned")], Chat())

    def refuse(reply: Reply) -> None:
        raise RuntimeError(reply.name)

    with pytest.raises(RuntimeError, match="base"):
        session.ask("a", on_reply=refuse)
    assert session.history() == session.history(1) == ()


def test_a_real_model_interrupted(tuned: nn.Module, renderer: Renderer) -> None:
    def speakers() -> list[ModelSpeaker]:
        return [ModelSpeaker("base", tuned, renderer, adapted=False), ModelSpeaker("tuned", tuned, renderer)]

    settings = Chat(temperature=0.8, top_p=0.9, max_new_tokens=16)
    whole = Session(speakers(), settings, seed=3).ask("¿Qué es?")
    session = Session(speakers(), settings, seed=3)
    cut = session.ask("¿Qué es?", interrupt_at(4))  # type: ignore[arg-type]
    assert cut[0].stopped and cut[0].text and whole[0].text.startswith(cut[0].text)
    assert cut[0].text != whole[0].text != whole[1].text
    assert cut[1] == whole[1]
    session.reset()
    assert session.ask("¿Qué es?") == whole, "a reset session with the same seed says the same"


def test_a_real_model_never_leaves_its_context(base: nn.Module, renderer: Renderer) -> None:
    class Measured(ModelSpeaker):
        def answer(self, messages, settings, seed, on_text):  # type: ignore[no-untyped-def]
            assert self.length(messages) + settings.max_new_tokens <= 96
            return super().answer(messages, settings, seed, on_text)

    session = Session([Measured("base", base, renderer)], Chat(max_new_tokens=32), limit=96)
    assert sum(session.ask(f"What is {n} times {n}?")[0].forgotten for n in range(6)) >= 2
    assert len(session.history()) < 12


def test_talking_to_a_gguf_file_needs_no_torch() -> None:
    script = """
import sys
from afina import pipeline
from afina.errors import ModelError
try: pipeline.chat("missing.gguf", prompt="Hello")
except ModelError: sys.exit("torch" in sys.modules or "transformers" in sys.modules)
sys.exit("it was opened")
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2] / "src").returncode == 0


def test_talking_needs_no_torch() -> None:
    script = "import afina.serve.terminal, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2] / "src").returncode == 0
