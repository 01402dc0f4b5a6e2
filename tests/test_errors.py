"""The error tree is what its docstring draws, and says where."""

import errno
import os
import re
import signal

import pytest

from afina import errors
from afina.errors import AfinaError, DataError, Interrupted, reason_of

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AfinaError)]


def documented() -> dict[str, int]:
    """Class and exit status of each line of the drawing."""
    return {
        name: int(status) for name, status in re.findall(r"^[\s├└─]*(\w+) +(\d+) {3}", errors.__doc__, re.MULTILINE)
    }


def test_exit_statuses_are_the_documented_ones():
    actual = {kind.__name__: kind("x").exit_status for kind in CLASSES}
    assert documented() == actual
    assert len(set(actual.values())) == len(actual) == 8


def test_no_status_means_success_or_a_signal_by_chance():
    for kind in CLASSES:
        assert 1 <= kind("x").exit_status < 64 or kind is Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_has_the_status_of_its_signal(number):
    assert Interrupted("stopped", signal_number=number).exit_status == 128 + number
    assert Interrupted("stopped").exit_status == 130


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({}, "broken"),
        ({"file": "a.jsonl"}, "a.jsonl: broken"),
        ({"file": "a.jsonl", "line": 3}, "a.jsonl:3: broken"),
        ({"file": "a.jsonl", "line": 3, "column": 9}, "a.jsonl:3:9: broken"),
    ],
)
def test_the_place_is_written_as_editors_read_it(place, expected):
    assert str(DataError("broken", **place)) == expected
    assert str(DataError("broken", hint="Mend it.", **place)) == f"{expected}\nMend it."


def test_what_the_system_refuses_is_said_in_spanish_too(monkeypatch):
    """What is not usual stays as the system says it."""
    assert reason_of(FileNotFoundError(errno.ENOENT, "x")) == "No such file or directory"
    monkeypatch.setenv("AFINA_LANG", "es")
    assert reason_of(FileNotFoundError(errno.ENOENT, "x")) == "No existe el archivo o la carpeta"
    assert reason_of(OSError(errno.EMFILE, "x")) == os.strerror(errno.EMFILE)
    assert reason_of(OSError("odd")) == "odd"
