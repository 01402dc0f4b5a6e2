import subprocess
import sys
import threading

import pytest

from afina.beside import begun, each
from afina.errors import DataError


def test_what_is_begun_is_had_or_raised():
    assert begun(lambda: 3).result() == 3

    def fail():
        raise DataError("no")

    with pytest.raises(DataError):
        begun(fail).result()


def test_a_program_that_ends_meanwhile_ends_as_it_says():
    """In the middle of C++, as when torch is imported, a thread that is not waited for would end it with SIGABRT."""
    code = "from afina.beside import begun; begun(lambda: __import__('torch')); print('ended'); raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "ended\n", "")


def test_each_is_had_once_whatever_is_worked_on_at_once():
    for at_once in (1, 3, 50):
        assert sorted(each(lambda number: number**2, range(20), at_once)) == [(n, n**2) for n in range(20)]
    assert list(each(lambda number: number, (), 4)) == []


def test_what_goes_wrong_with_one_is_raised_and_no_more_are_begun():
    begun_with: list[int] = []

    def work(number: int) -> int:
        begun_with.append(number)
        if number == 3:
            raise AttributeError("odd")
        return number

    with pytest.raises(AttributeError, match="odd"):
        list(each(work, range(1000), 1))
    assert begun_with == [0, 1, 2, 3]


def test_who_leaves_waits_for_nothing():
    never = threading.Event()
    work = each(lambda number: number == 0 or never.wait(600), range(8), 2)
    assert next(work) == (0, True)
    work.close()  # returns though one is under way
    never.set()
