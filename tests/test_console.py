"""What people see and what machines read; a remaining time that is honest; text that stays text."""

import io
import json
import sys

import pytest

from afina import console as module
from afina.console import Console, Progress, duration, printable, size
from afina.errors import RecipeError

HOSTILE = "[bold]a[/bold] [/] :smile: [link=x]y[/link] back\\[slash]\\"
"""Text of a user's file that rich would take for markup, emoji and links."""
CONTROL = "\x1b]0;owned\x07\x1b[2Jred\x1b[31m\rback\x9b1m\x00"
"""What a model could answer to move the cursor, clear the screen or rename the window."""


@pytest.fixture
def console():
    return Console()


@pytest.fixture
def machine():
    made = Console()
    made.json = True
    return made


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


class TestPeople:
    def test_markup_of_the_user_is_text(self, console, capsys):
        console.line(HOSTILE)
        console.heading(HOSTILE)
        console.stream(HOSTILE + "\n")
        console.table([HOSTILE, "b"], [[HOSTILE, "2"]], title=HOSTILE)
        shown = capsys.readouterr().out
        assert shown.count(HOSTILE) == 6

    def test_markup_in_errors_and_warnings_is_text(self, console, capsys):
        console.warn(HOSTILE)
        console.error(RecipeError(HOSTILE, hint=HOSTILE, file="[red]f.yaml", line=3))
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"! {HOSTILE}\nError [red]f.yaml:3: {HOSTILE}\n  {HOSTILE}\n"

    def test_control_characters_are_not_printed(self, console, capsys):
        console.line(CONTROL)
        console.stream(CONTROL + "\n")
        console.warn(CONTROL)
        console.table(["a"], [[CONTROL]])
        console.error(RecipeError(CONTROL, hint=CONTROL))
        said = capsys.readouterr()
        assert not set(said.out + said.err) & {"\x1b", "\x07", "\x9b", "\x00", "\r"}
        assert printable("a\tñ→😀\n\u2028") == "a\tñ→😀\n\u2028"

    def test_a_long_line_is_one_line_where_there_is_no_terminal(self, console, capsys):
        console.line("word " * 100)
        console.error(RecipeError("word " * 100))
        said = capsys.readouterr()
        assert (said.out.count("\n"), said.err.count("\n")) == (1, 1)

    def test_nothing_of_machines(self, console, capsys):
        console.event("step", loss=1)
        assert capsys.readouterr().out == ""


class TestMachines:
    def test_one_object_a_line_and_nothing_else(self, machine, capsys):
        machine.line("x")
        machine.heading("x")
        machine.stream("x")
        machine.table(["a"], [["b"]])
        machine.event("step", loss=1.5, text="ñ\n", path=io)
        machine.warn("careful")
        machine.error(RecipeError("broken", hint="mend", file="f", line=1, column=2))
        said = capsys.readouterr()
        assert said.err == ""
        step, warning, error = events(said.out)
        assert step["event"] == "step" and step["loss"] == 1.5 and step["text"] == "ñ\n"
        assert warning == {"event": "warning", "message": "careful"}
        assert error == {
            "event": "error",
            "message": "broken",
            "hint": "mend",
            "file": "f",
            "line": 1,
            "column": 2,
            "exit_status": 2,
        }

    def test_progress_is_events(self, machine, clock, capsys):
        with machine.progress("Training", 10) as progress:
            for step in range(10):
                clock.sleep(1)
                progress.advance(1, f"step {step}", step=step)
        told = events(capsys.readouterr().out)
        assert [event["step"] for event in told] == list(range(10))
        assert told[0]["remaining_s"] is None
        assert told[4]["remaining_s"] == pytest.approx(5)
        assert told[-1]["share"] == 1 and told[-1]["remaining_s"] == 0


class TestPlainProgress:
    def test_a_line_now_and_then(self, console, clock, capsys):
        """100 steps of a second: a line every ten seconds, and the last."""
        with console.progress("Training", 100) as progress:
            for step in range(1, 101):
                clock.sleep(1)
                progress.advance(1, f"step {step}/100")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert lines[0] == "Training  10%  step 10/100 · 1 min 30 s left"
        assert lines[-1] == "Training 100%  step 100/100"

    def test_work_without_words_keeps_the_last_ones(self, console, clock, capsys):
        with console.progress("Training", 2) as progress:
            progress.advance(1, "step 1/1 · loss 0.5")
            clock.sleep(20)
            progress.advance(1)
        assert capsys.readouterr().out == "Training 100%  step 1/1 · loss 0.5\n"

    def test_more_work_than_was_said_stays_at_all_of_it(self, console, clock, capsys):
        with console.progress("Training", 2) as progress:
            for _step in range(4):
                clock.sleep(20)
                progress.advance(1, "on")
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "Training 100%  on"

    def test_text_is_text(self, console, clock, capsys):
        with console.progress(HOSTILE, 1) as progress:
            progress.advance(1, HOSTILE)
        assert capsys.readouterr().out.count(HOSTILE) == 2


class TestBar:
    def test_on_a_terminal_it_is_drawn_and_taken_away(self, console, monkeypatch):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("TERM", "xterm")
        with console.progress("Training [x]", 2) as progress:
            progress.advance(1, "step [1]")
            progress.advance(1, "step [2]")
        drawn = screen.getvalue()
        assert "Training [x]" in drawn and "step [2]" in drawn
        assert drawn.rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))

    def test_it_is_taken_away_when_the_work_fails(self, console, monkeypatch):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(KeyboardInterrupt), console.progress("Training", 2):
            raise KeyboardInterrupt
        assert "\x1b[?25h" in screen.getvalue(), "the cursor is shown again"


class TestRemaining:
    def follow(self, clock, paces: list[float], total: int) -> list[float | None]:
        """What is promised after each step, where step i takes `paces[i]` seconds."""
        progress = Progress(Console(), "x", total)
        promised = []
        for pace in paces:
            clock.sleep(pace)
            progress.advance(1)
            promised.append(progress.remaining_s)
        return promised

    def test_a_constant_pace_is_known_from_the_second_step(self, clock):
        promised = self.follow(clock, [2.0] * 50, 50)
        assert promised[0] is None
        for step, left in enumerate(promised[1:], 2):
            assert left == pytest.approx(2.0 * (50 - step))

    def test_a_slow_first_step_does_not_count(self, clock):
        """Compilation, caches: a minute before the first step, a second for each of the others."""
        promised = self.follow(clock, [60.0] + [1.0] * 99, 100)
        assert promised[1] == pytest.approx(98)
        assert promised[9] == pytest.approx(90)

    def test_a_new_pace_is_believed_within_half_a_minute(self, clock):
        """The machine becomes three times slower half-way: after 30 seconds the promise is right again."""
        promised = self.follow(clock, [1.0] * 100 + [3.0] * 100, 200)
        assert promised[99] == pytest.approx(100)
        assert promised[99 + 11] == pytest.approx(3 * 89, rel=0.01)
        assert promised[99] < promised[104] < promised[110], "and it moves there without leaping"

    def test_uneven_steps_are_averaged(self, clock):
        promised = self.follow(clock, [0.5, 1.5] * 100, 200)
        for step in range(40, 190):
            assert promised[step] == pytest.approx(199 - step, rel=0.05)

    def test_a_step_that_hangs_makes_the_promise_grow(self, clock):
        progress = Progress(Console(), "x", 100)
        for _step in range(10):
            clock.sleep(1)
            progress.advance(1)
        before = progress.remaining_s
        clock.sleep(300)
        assert progress.remaining_s > 10 * before

    def test_work_counts_not_steps(self, clock):
        """Long samples first, short ones later: the promise follows the tokens."""
        progress = Progress(Console(), "x", 10 * 1000 + 10 * 10)
        for work in [1000] * 10:
            clock.sleep(work / 100)
            progress.advance(work)
        assert progress.remaining_s == pytest.approx(1)

    def test_nothing_is_promised_without_a_pace(self, clock):
        progress = Progress(Console(), "x", 0)
        assert progress.remaining_s is None
        progress.advance(1)
        assert progress.remaining_s is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3_500_000, "3.3 MiB"),
        (2**31, "2.0 GiB"),
        (2**45, "32768.0 GiB"),
    ],
)
def test_sizes(count, said):
    assert size(count) == said
