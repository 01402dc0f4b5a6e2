"""Rows prepared by a process of its own make the same run, with the same words, as rows prepared in turn."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from journey.tiny import lay_out, row

from afina.apart import Apart, cores
from afina.console import console
from afina.data.cache import FOLDER
from afina.recipe.load import load
from afina.train import ahead, examples
from afina.train.ahead import prepare_rows, rows_ahead
from afina.train.examples import Examples, prepare, prepare_once, renderer_of

ROWS = 6_000
"""Enough to be large, in half a second."""
PROCESS = f"{prepare_rows.__module__}:{prepare_rows.__name__}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    lines = [row(f"The soup of day {number} is fine. " * 3, "good") for number in range(ROWS)]
    lines[4_999] = row("Too long. " * 60, "bad")
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert (folder / "train.jsonl").stat().st_size > ahead.LEAST_BYTES
    return folder


ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], sys.argv[1:])"
)


def train(world: Path, place: Path, *changes: str, one_core: bool = False) -> subprocess.Popen:
    asked = [sys.executable, "-m", "afina", "train", "recipe.yaml", "tasks=[]", "export.formats=[]", *changes]
    return subprocess.Popen(
        [*([sys.executable, "-c", ONE_CORE] if one_core else []), *asked, "--out", str(place)],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
    )


def plain(found: Examples) -> list:
    """All there is to examples but the texts they come from."""
    return [
        [[one.ids.tolist(), one.learnt.tolist()] for one in [*found.train, *found.validation]],
        [sample.where for sample in found.origin],
        [(sample.where, reason) for sample, reason in found.rejected],
        [found.rows, found.read, found.files, found.dialects, found.encodings],
    ]


def test_what_the_process_leaves_is_what_would_be_made_here(world, tmp_path, monkeypatch):
    """Without torch there: the tokenizer is the same to the byte, else it would be found under another name."""
    recipe = load(world / "recipe.yaml", ["data.too_long=reject"])
    renderer = renderer_of(recipe, world)
    expected = prepare(recipe, world, renderer, console)
    assert len(expected.rejected) == 1
    with Apart(PROCESS) as process:
        process.begin(recipe=recipe.resolved(), folder=str(world), place=str(tmp_path / "run"))
        monkeypatch.setattr(examples, "prepare", None)  # nothing is prepared here
        found = prepare_once(recipe, world, renderer, console, tmp_path / FOLDER, process)
    assert plain(found) == plain(expected)
    with Apart(PROCESS) as again:
        again.begin(recipe=recipe.resolved(), folder=str(world), place=str(tmp_path / "run"))
        assert not again.done(), "it was there"


@pytest.mark.slow
def test_the_run_is_the_same_as_on_one_core(world, tmp_path):
    made = []
    for one_core in (False, True):
        place = tmp_path / str(one_core) / "run"
        place.parent.mkdir()
        process = train(world, place, "training.steps=3", "data.too_long=reject", one_core=one_core)
        said, complained = process.communicate(timeout=300)
        assert process.returncode == 0, complained
        manifest = json.loads((place / "manifest.json").read_text())
        lines = [line for line in said.splitlines() if "tokens/s" not in line]
        made.append((lines, complained, manifest["data"], manifest["training"]["state_sha256"]))
        assert one_core or cores() == 1 or len(list((place.parent / FOLDER).iterdir())) == 1
    assert made[0] == made[1]
    assert "1 rejected" in str(made[0][0]) and "as it was rendered before" not in str(made[0][0])


@pytest.mark.slow
def test_a_wrong_row_is_told_as_on_one_core(world, tmp_path):
    (tmp_path / "bad.jsonl").write_text((world / "train.jsonl").read_text() + '{"messages": 1}\n')
    told = []
    for one_core in (False, True):
        process = train(world, tmp_path / "run", f"data.train={tmp_path / 'bad.jsonl'}", one_core=one_core)
        told.append((*process.communicate(timeout=300), process.returncode))
    assert told[0] == told[1]
    assert told[0][2] == 3 and f"bad.jsonl:{ROWS + 1}" in told[0][1]
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(cores() == 1, reason="there is no core for a process of its own")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGKILL", -9)])
def test_it_ends_with_the_run(world, tmp_path, name, status):
    lines = (world / "train.jsonl").read_text() * 20
    (tmp_path / "many.jsonl").write_text(lines)
    process = train(world, tmp_path / "run", f"data.train={tmp_path / 'many.jsonl'}", "data.validation=0")
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if name != "SIGKILL":  # wait for it, and in the middle of its work
        assert "Training" in process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, name))
    _said, complained = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in complained
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_it_is_begun_only_where_it_saves_time(world, tmp_path, monkeypatch):
    recipe = load(world / "recipe.yaml")
    small = load(world / "recipe.yaml", ["data.train=small.jsonl"])
    missing = load(world / "recipe.yaml", ["data.train=missing.jsonl"])
    hub = load(world / "recipe.yaml", ["data.train=hub:some/thing"])
    (world / "small.jsonl").write_text(row("Fine.", "good"))
    with rows_ahead(recipe, world, tmp_path / "run") as process:
        assert process is None, "torch is there already"
    monkeypatch.delitem(sys.modules, "torch")
    begun = []
    monkeypatch.setattr(ahead, "Apart", lambda work: begun.append(work) or Apart(work))
    for one in (small, missing, hub):
        with rows_ahead(one, world, tmp_path / "run") as process:
            assert process is None
    assert begun == []
    with rows_ahead(recipe, world, tmp_path / "run") as process:
        assert process is not None
    assert begun == [PROCESS]
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    with rows_ahead(recipe, world, tmp_path / "run") as process:
        assert process is None
