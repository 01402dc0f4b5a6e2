"""P2, P3, P7: a checkpoint is complete and verified or not there, after any crash, corruption or full disk."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CPU, llama

from afina import durable
from afina.artifact import sha256
from afina.data.template import Rendered
from afina.engine.block import HERE, Placement
from afina.engine.plan import Plan
from afina.errors import OutputError
from afina.model.attach import attach
from afina.recipe.schema import Lora, Recipe, Training
from afina.train import checkpoint
from afina.train.checkpoint import (
    FACTS,
    TENSORS,
    Damaged,
    facts_of,
    newest,
    prune,
    read,
    restore,
    snapshot,
    write,
)
from afina.train.keeper import Keeper
from afina.train.kept_plan import keep_plan, kept_plan
from afina.train.resume import PLAN, refuse_other_recipe
from afina.train.resume import begin as enter
from afina.train.state import begin


@pytest.fixture(scope="module")
def state():
    return begin(attach(llama(), Lora(rank=1, targets=["q_proj"]), seed=0), Training(), CPU)


def small(value: float) -> dict[str, torch.Tensor]:
    return {"a|weight": torch.full((4,), value)}


def test_what_is_written_is_read(tmp_path, state):
    saved = write(tmp_path, "run", 3, snapshot(state), facts_of(state))
    assert read(saved.place, "run") == saved
    assert newest(tmp_path, "run", print) == saved and saved.place.name == "000001-step-3"


CORRUPTIONS = 10_000


@pytest.mark.slow
def test_corruptions_are_recognised_and_the_newest_good_one_is_taken(tmp_path):
    """Truncated, bits flipped, grown, zeroed, swapped, missing, of another run, no plain file."""
    folder, chance = tmp_path / "c", random.Random(1)
    good = write(folder, "run", 1, small(1.0), {"tally": {"loss": 1.5}})
    bad = write(folder, "run", 2, small(2.0), {"tally": {"loss": 2.5}})
    other = write(tmp_path / "other", "another run", 2, small(3.0), {})
    contents = {name: (bad.place / name).read_bytes() for name in (TENSORS, FACTS)}
    harmless = 0
    for number in range(CORRUPTIONS):
        name = chance.choice([TENSORS, FACTS])
        file, content = bad.place / name, contents[name]
        at = chance.randrange(len(content))
        match number % 10:
            case 0:
                file.write_bytes(content[:at])
            case 1 | 2 | 3 | 4:
                file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            case 5:
                file.write_bytes(content + b"\0" * (at + 1))
            case 6:
                file.write_bytes(content[:at] + b"\0" * (len(content) - at - 1) + b"\1")
            case 7:
                file.unlink()
            case 8:
                file.unlink()
                chance.choice([os.mkfifo, lambda to: to.symlink_to(good.place / to.name), Path.mkdir])(file)
            case 9:
                file.write_bytes(chance.choice([(other.place / FACTS).read_bytes(), (good.place / FACTS).read_bytes()]))
        said: list[str] = []
        found = newest(folder, "run", lambda place, reason, said=said: said.append(f"{place.name}: {reason}"))
        if found == bad and name == FACTS:  # a space more or less between two words of JSON says the same
            harmless += 1
        else:
            assert found == good and len(said) == 1 and said[0].startswith("000002-step-2: "), (number, name)
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    assert newest(folder, "run", print) == bad and harmless < CORRUPTIONS / 50


def test_a_renamed_or_foreign_folder_is_not_taken(tmp_path, state):
    saved = write(tmp_path, "run", 1, snapshot(state), facts_of(state))
    shutil.copytree(saved.place, tmp_path / "000009-step-9")
    (tmp_path / "000010-step-10").symlink_to(saved.place)
    (tmp_path / "000011-step-11").write_bytes(b"")
    said: list[Path] = []
    assert newest(tmp_path, "run", lambda place, reason: said.append(place)) == saved and len(said) == 3
    assert newest(tmp_path, "another run", lambda place, reason: None) is None


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, state, monkeypatch):
    write(tmp_path, "run", 1, snapshot(state), facts_of(state))
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        write(tmp_path, "run", 2, snapshot(state), {**facts_of(state), "what is not known yet": [1]})
    with pytest.raises(OutputError, match="000002-step-2 was written by a newer version of afina"):
        newest(tmp_path, "run", lambda place, reason: None)


@pytest.mark.parametrize("lie", [(2**62).to_bytes(8, "little") + b"{}", b"", b"\x08" + b"\0" * 7 + b'{"a":{}}'])
def test_a_checkpoint_whose_hashes_hold_and_whose_tensors_lie_changes_nothing(tmp_path, state, lie):
    """Made by hand, with lengths beyond the file, and hashes that are right."""
    good = write(tmp_path, "run", 1, snapshot(state), facts_of(state))
    (good.place / TENSORS).write_bytes(lie)
    body = {**good.facts, "sha256": sha256(good.place / TENSORS)}
    (good.place / FACTS).write_text(json.dumps({"sha256": checkpoint._digest(body), "body": body}))
    before = snapshot(state)
    with pytest.raises(Damaged):
        restore(state, read(good.place, "run"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(state).items())


def test_a_run_may_move_to_a_machine_with_other_paths(tmp_path):
    """What was read is known by its hash; a name in state.json is shown, never followed."""
    recipe = Recipe.model_validate({"name": "x", "data": {"train": "x"}})
    here, there = (
        [{"role": "data", "name": f"{folder}/train.jsonl", "sha256": "5" * 64}] for folder in ("/here", "/there")
    )
    run = enter(tmp_path, recipe, here, [])
    assert enter(tmp_path, recipe, there, []) == run
    with pytest.raises(OutputError, match=r"/there/train\.jsonl has changed"):
        enter(tmp_path, recipe, [{**there[0], "sha256": "6" * 64}], [])


def test_another_recipe_or_other_samples_are_refused_with_the_difference(tmp_path):
    def recipe(**training):
        return Recipe.model_validate({"name": "x", "data": {"train": "x"}, "training": training})

    row = Rendered(np.arange(4, dtype=np.int32), np.ones(4, dtype=bool))
    other = Rendered(np.arange(4, dtype=np.int32), np.array([False, True, True, True]))
    file = {"role": "data", "name": "train.jsonl", "sha256": "5" * 64}
    run = enter(tmp_path, recipe(learning_rate=1e-4), [file], [row])
    assert enter(tmp_path, recipe(learning_rate=1e-4, checkpoint_minutes=5, keep_checkpoints=1), [file], [row]) == run
    refuse_other_recipe(tmp_path, recipe(learning_rate=1e-4))
    for refused, said in (
        (
            lambda: refuse_other_recipe(tmp_path, recipe(learning_rate=2e-4)),
            r"training\.learning_rate: 0.0001 → 0.0002",
        ),
        (lambda: enter(tmp_path, recipe(batch_size=3), [file], [row]), r"training\.batch_size: \d+ → 3"),
        (lambda: enter(tmp_path, recipe(learning_rate=1e-4), [], [row]), "fewer"),
        (lambda: enter(tmp_path, recipe(learning_rate=1e-4), [file], [other]), "samples look different to the model"),
    ):
        with pytest.raises(OutputError, match=said):
            refused()
    assert enter(tmp_path, recipe(learning_rate=1e-4), [file], [row]) == run


def test_the_engines_plan_is_kept_for_the_next_sitting(tmp_path):
    rungs = [HERE, Placement(away=frozenset({"x", "h"}), again=frozenset({"gate_up"}))]
    plan = Plan(4096, rungs, 512, "embedding", 10**9, 12.5, 1)
    assert kept_plan(tmp_path) is None
    keep_plan(tmp_path, plan)
    assert kept_plan(tmp_path) == plan
    whole = (tmp_path / PLAN).read_text()
    for damaged in (whole[:40], "[1]", whole.replace("512", '"many"'), whole.replace('"away"', '"a"'), "[" * 10**5):
        (tmp_path / PLAN).write_text(damaged)
        assert kept_plan(tmp_path) is None


class Disk:
    """Records what a save asks of the disk, and enumerates what may be there after the power fails.

    A file's bytes are there for certain once it was synced, a name once its folder was; before, they may be or not.
    """

    def __init__(self, folder: Path, monkeypatch, syncs: bool) -> None:
        self.folder, self.operations, self.syncs = folder, [], syncs
        self._seen: dict[Path, bytes] = {}
        for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *given, real=real, name=name, **more: self._do(name, real, given, more)
            )

    def _do(self, name, real, given, more):
        self._look()
        place = Path(f"/proc/self/fd/{given[0]}").readlink() if name == "fsync" else None
        result = real(*given, **more)
        if name == "fsync" and self.syncs:
            self.operations.append(("sync", Path(place)))
        elif name in ("rename", "replace"):
            self.operations.append(("rename", Path(given[0]), Path(given[1])))
            self._seen = {
                Path(given[1]) / path.relative_to(given[0]) if path.is_relative_to(given[0]) else path: content
                for path, content in self._seen.items()
            }
        elif name == "unlink" and not more:
            self.operations.append(("unlink", Path(given[0])))
        return result

    def _look(self) -> None:
        """Whatever was written since the last look, by whomever."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and self._seen.get(path) != path.read_bytes():
                self._seen[path] = path.read_bytes()
                self.operations.append(("write", path, self._seen[path]))

    def states(self, before: dict[Path, bytes], end: int):
        """Every tree there may be when the power fails after `end` operations: {path: content}."""
        sure, names, loose = dict(before), [], {}
        for operation in self.operations[:end]:
            kind, path = operation[0], operation[1]
            if kind == "write":
                loose[path] = operation[2]
                sure[path] = sure.get(path, b"")
            elif kind == "sync" and path in loose:
                sure[path] = loose.pop(path)
            elif kind == "sync":
                for done in [one for one in names if one[1].parent == path]:
                    names.remove(done)
                    self._name(sure, loose, done)
            else:
                names.append(operation)
        for kept in itertools.product([False, True], repeat=len(names)):
            for amounts in itertools.product((0.0, 0.5, 1.0), repeat=len(loose)):
                tree, dirty = dict(sure), dict(loose)
                for (path, content), amount in zip(loose.items(), amounts, strict=True):
                    tree[path] = content[: int(len(content) * amount)]
                for done in itertools.compress(names, kept):
                    self._name(tree, dirty, done)
                yield tree

    @staticmethod
    def _name(tree, loose, operation) -> None:
        for files in (tree, loose):
            for path in [path for path in files if path.is_relative_to(operation[1])]:
                content = files.pop(path)
                if operation[0] == "rename":
                    files[operation[2] / path.relative_to(operation[1])] = content


def bad_states(tmp_path, monkeypatch, *, verified=True, syncs=True) -> tuple[int, int]:
    """(bad, all): states after a save and the pruning of the one before it in which no checkpoint is good."""
    folder = tmp_path / "c"
    first = write(folder, "run", 1, small(1.0), {})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        disk = Disk(folder, patched, syncs)
        disk._seen = dict(before)
        second = write(folder, "run", 2, small(2.0), {})
        prune(folder, [second.place])
        disk._look()
    bad = count = 0
    seen = set()
    for end in range(len(disk.operations) + 1):
        for tree in disk.states(before, end):
            key = frozenset(tree.items())
            if key in seen:
                continue
            seen.add(key)
            count += 1
            shutil.rmtree(folder)
            folder.mkdir()
            for path, content in tree.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            if verified:
                found = newest(folder, "run", lambda place, reason: None)
                bad += found is None or found.digest not in (first.digest, second.digest)
            else:  # what most trainers do: the highest number is taken as it is
                names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
                whole = (before[first.place / TENSORS], disk._seen.get(second.place / TENSORS))
                bad += (
                    not names or not (names[-1] / TENSORS).is_file() or (names[-1] / TENSORS).read_bytes() not in whole
                )
    return bad, count


def test_no_power_failure_loses_both_old_and_new(tmp_path, monkeypatch):
    bad, count = bad_states(tmp_path, monkeypatch)
    assert bad == 0 and count >= 14


@pytest.mark.parametrize("weaker", ["no sync, no hash", "no sync", "files synced, folders not"])
def test_the_weaker_protocols_lose(tmp_path, monkeypatch, weaker):
    real = durable._sync

    if weaker == "files synced, folders not":
        monkeypatch.setattr(durable, "_sync", lambda path: None if path.is_dir() else real(path))
    synced, verified = weaker.startswith("files"), weaker != "no sync, no hash"
    bad, _count = bad_states(tmp_path, monkeypatch, verified=verified, syncs=synced)
    assert bad > 0


SIZES = 200


def test_a_full_disk_takes_no_good_checkpoint_and_training_goes_on_when_there_is_room(tmp_path, state):
    """At each of 200 limits of a file's size: the old one stays, it is said once, the next save is well again."""
    said: list[str] = []
    keeper = Keeper(tmp_path / "c", "run", Training(keep_checkpoints=1), said.append)
    keeper.save(state, {}, wait=True)
    old = keeper.good[-1]

    size, before = (old.place / TENSORS).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for part in range(SIZES):
            resource.setrlimit(resource.RLIMIT_FSIZE, (part * size // SIZES, before[1]))
            keeper.save(state, {}, wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert newest(tmp_path / "c", "run", print) == old
            assert [path.name for path in (tmp_path / "c").iterdir()] == [old.place.name]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(said) == 1 and "No checkpoint could be written" in said[0] and "goes on" in said[0]
    keeper.save(state, {}, wait=True)
    assert len(said) == 2 and "again" in said[1] and newest(tmp_path / "c", "run", print) == keeper.good[-1] != old


def test_the_newest_few_are_kept(tmp_path, state):
    keeper = Keeper(tmp_path / "c", "run", Training(keep_checkpoints=2), print)
    for _number in range(5):
        keeper.save(state, {}, wait=True)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["000004-step-0", "000005-step-0"]


def test_what_lies_where_is_looked_up_again_where_it_has_moved(tmp_path):
    """What is copied is what the state holds now, whatever was looked up for the save before."""
    moving = begin(attach(llama(), Lora(rank=1, targets=["q_proj"]), seed=0), Training(), CPU)
    keeper = Keeper(tmp_path / "c", "run", Training(), print)
    name, parameter = next(iter(moving.learning.items()))
    memory = moving.optimizer.state[parameter]
    for turn in range(1, 6):
        match turn:
            case 2:
                memory["exp_avg"].fill_(7.0)  # in place, as optimisers do
            case 3:
                memory["exp_avg"] = torch.full_like(memory["exp_avg"], 8.0)
            case 4:
                parameter.data = torch.full_like(parameter.data, 9.0)
            case 5:
                moving.optimizer.state[parameter] = {**memory, "exp_avg": torch.full_like(parameter.data, 5.0)}
        keeper.save(moving, {}, wait=True)
        saved, now = checkpoint.tensors_of(keeper.good[-1]), snapshot(moving)
        assert saved.keys() == now.keys() and all(torch.equal(saved[key], now[key]) for key in now)
        first = now[f"{name}|exp_avg"].flatten()[0], now[f"{name}|weight"].flatten()[0]
        assert first[0] == [0, 7, 8, 8, 5][turn - 1] and (first[1] == 9) == (turn >= 4)


def test_a_row_is_all_values_end_to_end():
    group = {"a": torch.randn(3, 4), "b": torch.randn(5, 2).t(), "c": torch.randn(())}
    row = checkpoint._in_a_row(group)
    for _turn in range(2):
        whole = row.copy()
        parts = whole.split([shape.numel() for _name, shape in row.entries])
        found = {name: part.view(shape) for (name, shape), part in zip(row.entries, parts, strict=True)}
        assert found.keys() == group.keys() and all(torch.equal(found[name], group[name]) for name in group)
        for tensor in group.values():
            tensor.add_(1)  # seen by the next copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_what_is_no_number_is_seen_by_its_ends(dtype):
    assert checkpoint._is_finite(torch.zeros(0, dtype=dtype)) and checkpoint._is_finite(torch.ones(7, dtype=dtype))
    for value in (float("nan"), float("inf"), -float("inf")) if dtype.is_floating_point else ():
        for place in (0, 3, 6):
            tensor = torch.linspace(-1, 1, 7).to(dtype)
            tensor[place] = value
            assert not checkpoint._is_finite(tensor)


def test_a_state_of_no_numbers_is_not_saved(tmp_path):
    broken = begin(attach(llama(), Lora(rank=1), seed=0), Training(), CPU)
    next(iter(broken.learning.values())).data.fill_(float("nan"))
    keeper = Keeper(tmp_path / "c", "run", Training(), print)
    keeper.save(broken, {}, wait=True)
    assert keeper.newest() is None


def test_a_save_that_fails_for_any_reason_is_told(tmp_path, state, monkeypatch):
    said: list[str] = []

    def odd(tensors, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(checkpoint, "_save", odd)
    keeper = Keeper(tmp_path / "c", "run", Training(), said.append)
    keeper.save(state, {}, wait=True)
    assert len(said) == 1 and "something else" in said[0] and not list((tmp_path / "c").iterdir())
