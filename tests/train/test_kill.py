"""P1 and P4 on real processes: killed or asked to stop at random instants, the result is that of the run left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from journey.tiny import lay_out, save_base, write_rows
from train.torture import VARIANTS

TORTURED = int(os.environ.get("AFINA_TORTURE", "0"))
"""How many kills each of the variants must survive; unset, three of them survive a hundred together."""
KILLS = 34
QUICK = ("lora-dropout-packed", "lora-packed-auto", "full-padded")
TORTURE = Path(__file__).with_name("torture.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    return folder


def torture(world: Path, kills: int, variant: str, signal_name: str = "SIGKILL") -> dict:
    asked = [sys.executable, str(TORTURE), str(world), str(kills), "1", variant, signal_name]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(variant, found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kills_change_no_bit(world, variant):
    if not TORTURED and variant not in QUICK:
        pytest.skip("all variants: make torture")
    kills = TORTURED or KILLS
    found = torture(world, kills, variant)
    assert found["wrong"] == [] and found["kills"] >= kills


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_change_no_bit(world, name):
    if not TORTURED and name != "SIGTERM":
        pytest.skip("all signals: make torture")
    kills = TORTURED or 2
    found = torture(world, kills, "lora-reference", name)
    assert found["wrong"] == [] and found["kills"] >= kills


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_closes_in_good_order(world, tmp_path, twice):
    asked = [sys.executable, "-m", "afina", "train", "recipe.yaml", "training.steps=100000", "--json"]
    process = subprocess.Popen(
        [*asked, "--out", str(tmp_path / "run")],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        if '"step": 9,' in line:
            break
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    taken = time.monotonic() - started
    print(f"closed in {taken:.2f} s")
    assert process.returncode in ((130, -2) if twice else (130,))  # 2 s are aimed at; a time decides no test
    assert not list(tmp_path.glob("**/checkpoints/0*")) or (tmp_path / "run" / "state.json").is_file()


@pytest.fixture(scope="module")
def slow_world(tmp_path_factory) -> Path:
    """A base whose forward and backward of one step are each one call of some ten seconds of processor."""
    folder = tmp_path_factory.mktemp("slow")
    lay_out(folder)
    save_base(folder / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    write_rows(folder / "train.jsonl", [(f"Number {number} is fine.", "good") for number in range(3000)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_a_long_step_costs_little(slow_world, tmp_path, name):
    """What the process still computes after the signal, in seconds of the processor: the step has dozens of them."""
    overrides = ["training.engine=reference", "training.batch_size=2500", "training.micro_batch_tokens=65536"]
    asked = [sys.executable, "-m", "afina", "train", "recipe.yaml", "tasks=[]", "export.formats=[]", *overrides]
    with (tmp_path / "said").open("w") as said:
        process = psutil.Popen([*asked, "--out", str(tmp_path / "run")], cwd=slow_world, stdout=said, stderr=said)
        while not (tmp_path / "run" / "state.json").is_file():
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.01)
        begun = sum(process.cpu_times()[:2])
        while (before := sum(process.cpu_times()[:2])) < begun + 2:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(getattr(signal, name))
        _ended, status, used = os.wait4(process.pid, 0)
        taken = time.monotonic() - started
    after = used.ru_utime + used.ru_stime - before
    print(f"closed in {taken:.2f} s, {after:.2f} s of processor")
    assert os.waitstatus_to_exitcode(status) == 128 + getattr(signal, name), (tmp_path / "said").read_text()
    assert after < 3
    assert (tmp_path / "run" / "state.json").is_file() and not list(tmp_path.rglob("*.partial*"))
