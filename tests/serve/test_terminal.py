"""The talk as a person and as a program see it: through a pseudo-terminal, and through a pipe."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = [sys.executable, str(HERE / "scripted.py")]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE.parent)])
    return {**os.environ, "PYTHONPATH": paths, "AFINA_LANG": "en", "TERM": "xterm", **more}


def piped(text: str | bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    raw = text.encode() if isinstance(text, str) else text
    done = subprocess.run([*SCRIPT, *arguments], input=raw, capture_output=True, env=environment(), timeout=60)
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    )


def test_questions_from_a_pipe() -> None:
    done = piped("¿Qué es?\r\n\n  two  \nlast without end", "echo")
    assert done.stdout == "¿Qué es? (echo)\ntwo (echo)\nlast without end (echo)\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_two_speakers_from_a_pipe() -> None:
    assert piped("hi\n", "base", "tuned").stdout == "base\nhi (base)\ntuned\nhi (tuned)\n"


def test_json_events() -> None:
    done = piped("hi ñ\n/temperature 0\nmore\n", "base", "tuned", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0] == {
        "event": "answer", "speaker": "base", "question": "hi ñ", "text": "hi ñ (base)", "stopped": False,
        "forgotten": 0,
    }  # fmt: skip
    assert [(event["speaker"], event["question"]) for event in events] == [
        ("base", "hi ñ"), ("tuned", "hi ñ"), ("base", "more"), ("tuned", "more"),
    ]  # fmt: skip


def test_answer_once() -> None:
    done = piped("never read\n", "echo", "--once", "/etc/passwd, what is it?")
    assert (done.stdout, done.returncode) == ("/etc/passwd, what is it? (echo)\n", 0)
    assert json.loads(piped("", "echo", "--json", "--once", "hi").stdout)["text"] == "hi (echo)"


def test_forgetting_is_said_once() -> None:
    done = piped("a b c d e f\n" * 6, "base", "tuned")
    assert done.stderr.count("oldest turns are forgotten") == 1
    assert done.stdout.count("(tuned)") == 6
    again = piped("a b c d e f\n" * 6 + "/reset\n" + "a b c d e f\n" * 6, "echo")
    assert again.stderr.count("oldest turns are forgotten") == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/rest", "There is no command /rest.\n  Did you mean /reset?"),
        ("/topp 1", "Did you mean /top-p?"),
        ("/xyzzy", "There is no command /xyzzy.\n  /help lists the commands."),
        ("/temperature hot", "/temperature does not take “hot”."),
        ("/temperature -1", "/temperature does not take “-1”."),
        ("/temperature nan", "/temperature does not take “nan”."),
        ("/top-p 1.5", "/top-p does not take “1.5”."),
    ],
)
def test_commands_that_are_none(line: str, complaint: str) -> None:
    done = piped(f"{line}\nnever asked\n", "echo")
    assert complaint in done.stderr
    assert (done.stdout, done.returncode) == ("", 2)


def test_commands_from_a_pipe() -> None:
    done = piped("/temperature 0,3\n/TOP-P 0.5\n/system Be  brief.\n/system\n/help\n/reset\n/exit\nnever\n", "echo")
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "temperature is 0.3.",
        "top-p is 0.5.",
        "The system message is set; the conversation begins anew.",
        "No system message; the conversation begins anew.",
    ]
    assert "now 0.3" in done.stdout and "now 0.5" in done.stdout
    assert lines[-1] == "The conversation begins anew."


def test_input_that_is_no_text() -> None:
    done = piped(b"hi\n\xff\xfe\n", "echo")
    assert (done.stdout, done.returncode) == ("hi (echo)\n", 3)
    assert "not UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_piped_talk() -> None:
    with subprocess.Popen(
        [*SCRIPT, "base", "tuned"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(),
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"count\nnever\n")
        process.stdin.flush()
        assert process.stdout.read(7) == b"base\n0 "
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"tuned" not in rest and b"never" not in rest
    assert b"Traceback" not in errors


class Person:
    """Someone at a terminal: types, and waits for what they expect to see."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.terminal, inner = pty.openpty()
        self.process = subprocess.Popen(
            [*SCRIPT, *arguments], stdin=inner, stdout=inner, stderr=inner, env=environment(), start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def stop(self) -> None:
        """Ctrl-C, after the pause of a person: Python misses one in the instant before it waits for a key."""
        time.sleep(0.3)
        self.type("\x03")

    def see(self, text: str, *, seconds: float = 30) -> str:
        """Wait for a text and return what came up to its end. It is not looked for in what was seen before."""
        until, unread = time.monotonic() + seconds, b""
        while text not in self.seen:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.terminal], [], [], left)[0]:
                raise AssertionError(f"no {text!r} in {self.seen!r}")
            try:
                unread += os.read(self.terminal, 4096)
            except OSError:  # Linux says so when the other side has gone
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
            self.seen, unread = self.seen + unread.decode("utf-8", "ignore"), b""
        before, _text, self.seen = self.seen.partition(text)
        return before + text

    def end(self) -> int:
        status = self.process.wait(timeout=30)
        os.close(self.terminal)
        return status


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C, typed, becomes SIGINT


posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")


@posix
def test_a_talk_at_a_terminal() -> None:
    person = Person("base", "tuned")
    greeting = person.see("> ")
    assert "base · tuned" in greeting and "Ctrl-D" in greeting
    person.type("hola mundo\n")
    answer = person.see("> ")
    assert answer.index("base") < answer.index("hola mundo (base)") < answer.index("hola mundo (tuned)")
    person.type("/rest\n")
    assert "Did you mean /reset?" in person.see("> ")
    person.type("/temperature 0\n")
    assert "temperature is 0." in person.see("> ")
    person.type("\x1b[A\x1b[A\x1b[A again\n")  # up to the first question: history
    assert "hola mundo again (tuned)" in person.see("(tuned)")
    person.see("> ")
    person.type("word " * 50 + "\n")
    assert "tokens long" in person.see("Shorten")
    person.see("> ")
    person.type("\x04")
    assert person.end() == 0


@posix
def test_ctrl_c_at_a_terminal() -> None:
    person = Person("echo")
    person.see("> ")
    person.type("half a quest")
    person.see("quest")
    person.stop()
    assert "/exit" in person.see("> ")
    person.type("count\n")
    person.see("5 6 7 ")
    started = time.monotonic()
    person.stop()
    assert "99" not in person.see("> ")
    assert time.monotonic() - started < 10, "counting to the end takes 20 s"
    person.type("still here\n")
    assert "Traceback" not in person.see("still here (echo)")
    person.see("> ")
    person.type("/exit\n")
    assert person.end() == 0


@posix
def test_answers_do_not_drive_the_terminal() -> None:
    person = Person("echo")
    person.see("> ")
    person.type("hostile\n")
    answer = person.see("end")
    assert "red [31mend" in answer
    person.see("> ")
    person.type("\x04")
    assert person.end() == 0
