"""Another process does what it is asked, or else it is known that it did not; and it ends when whoever asked does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from afina.apart import Apart, cores

WORK = "work_apart:work"


@pytest.fixture(autouse=True)
def found_by_the_other(tmp_path, monkeypatch):
    """What the process imports: a module of what it may be asked here."""
    (tmp_path / "work_apart.py").write_text(
        "import os, pathlib, sys, time\n"
        "def work(path, text='', seconds=0.0, fail=False):\n"
        "    print('.', flush=True)\n"
        "    pathlib.Path(path).write_text(text or str(os.getpid()))\n"
        "    time.sleep(seconds)\n"
        "    assert not fail\n"
        "    return text != 'no'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def gone(number: int) -> bool:
    """Whether a process ends within a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def number_in(path: Path) -> int:
    """The process that has written itself there."""
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    return int(path.read_text())


def test_it_does_one_thing_after_the_other(tmp_path):
    long = "é" * 100_000  # more than a pipe holds
    with Apart(WORK) as process:
        process.begin(path=str(tmp_path / "a"), text=long).begin(path=str(tmp_path / "b"))
        assert process.done() and (tmp_path / "a").read_text() == long
        assert process.done()
        assert not process.begin(path=str(tmp_path / "c"), text="no").done()
        there = number_in(tmp_path / "b")
        assert there != os.getpid()
    assert not psutil.pid_exists(there)
    assert not process.done() and not process.begin(path="x").done(), "it is closed"


@pytest.mark.parametrize("work", [WORK, "work_apart:nothing", "no_such_module:work"])
def test_what_it_cannot_do_is_not_done(tmp_path, work):
    with Apart(work) as process:
        process.begin(path=str(tmp_path / "a"), fail=True)
        assert not process.done()
        assert not process.begin(path=str(tmp_path / "a")).done()


def test_where_no_process_can_be_had_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with Apart(WORK) as process:
        assert not process.begin(path=str(tmp_path / "a")).done()


def test_a_process_that_is_killed_has_not_done_it(tmp_path):
    with Apart(WORK) as process:
        process.begin(path=str(tmp_path / "a"), seconds=1000)
        os.kill(number_in(tmp_path / "a"), signal.SIGKILL)
        assert not process.done()


ASKING = """
import sys
from afina.apart import Apart
with Apart("work_apart:work") as process:
    process.begin(path=sys.argv[1], seconds=1000).done()
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", -signal.SIGINT)])
def test_it_ends_with_whoever_asked(tmp_path, name, status):
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    there = number_in(tmp_path / "a")
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == status
    assert gone(there)


def test_cores_are_those_that_may_be_used():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code = one + "from afina.apart import cores; print(cores())"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux says which")
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == 1
    assert cores() == len(os.sched_getaffinity(0))
