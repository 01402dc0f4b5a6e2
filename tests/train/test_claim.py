"""P8: two processes on one run folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from afina import durable
from afina.errors import OutputError

HOLD = "import sys, time; from pathlib import Path; from afina import durable\n" + (
    "with durable.claim(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_the_second_is_told_who_holds_it_and_a_killed_holder_is_none(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=rf"process {holder.pid} on .* since 20"), durable.claim(folder):
        pass
    assert (folder / durable.LOCK).exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / durable.LOCK).exists()
    with durable.claim(folder):
        assert str(os.getpid()) in (folder / durable.LOCK).read_text()
    assert not folder.exists()


def test_a_folder_with_something_in_it_stays(tmp_path):
    with durable.claim(tmp_path):
        (tmp_path / "state.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_of_many_that_race_one_at_a_time_holds(tmp_path):
    """Fifty forked processes claim, look and let go."""
    folder, children = tmp_path / "run", []
    for _number in range(50):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _again in range(200):
                    try:
                        with durable.claim(folder):
                            alone = folder / "alone"
                            with alone.open("x"):
                                time.sleep(0.001)
                            alone.unlink()
                        status = 0
                        break
                    except OutputError:
                        time.sleep(0.01)
            except FileExistsError:
                status = 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 50
