"""P2 and P3: whatever the disk refuses, and wherever the process dies, an old or a new checkpoint loads."""

import errno
import os
import shutil
from contextlib import suppress

import pytest
from train.faults import Dead, faulty
from train.sitting import sit
from train.test_checkpoint import small

from afina import durable
from afina.errors import OutputError
from afina.recipe.schema import Recipe
from afina.train.checkpoint import listed, newest, prune, write
from afina.train.resume import begin, is_unfinished

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "killed": Dead}


def save_and_prune(folder) -> None:
    saved = write(folder, "run", 2, small(2.0), {})
    prune(folder, [saved.place])


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_every_operation_of_a_save_may_fail(tmp_path, error):
    points = 0
    for nth in range(1, 1000):
        folder = tmp_path / str(nth)
        first = write(folder, "run", 1, small(1.0), {})
        with faulty(folder, nth, error) as disk, suppress(OutputError, OSError, Dead):
            save_and_prune(folder)
        if not disk.struck:
            break
        points += 1
        found = newest(folder, "run", lambda place, reason: None)
        assert found is not None and found.step in (1, 2), nth
        assert found.step == 2 or found.digest == first.digest
        assert {place for _number, _step, place in listed(folder)} <= {first.place, folder / "000002-step-2"}
        third = write(folder, "run", 3, small(3.0), {})
        prune(folder, [third.place])
        assert newest(folder, "run", print) == third
        for left in folder.glob(f".*{durable.PARTIAL}-*"):
            left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", "-4194304-")))
        durable.sweep(folder)  # once the process is dead, nothing of it stays
        assert [path.name for path in folder.iterdir()] == [third.place.name]
    assert points >= 14


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_run_that_dies_before_its_first_step_can_be_begun_again(tmp_path, error):
    recipe = Recipe.model_validate({"name": "x", "data": {"train": "x"}})
    for nth in range(1, 1000):
        place = tmp_path / str(nth)
        with faulty(place, nth, error) as disk, suppress(OutputError, OSError, Dead), durable.claim(place):
            begin(place, recipe, [], [])
        if not disk.struck:
            break
        assert not place.exists() or is_unfinished(place), nth
        with durable.claim(place):
            begin(place, recipe, [], [])
        assert is_unfinished(place)
        shutil.rmtree(place)
    assert nth > 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sit(tmp_path_factory.mktemp("whole"), save_after=(0, 3, 6, 9))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_run_goes_on_from_wherever_the_disk_failed(tmp_path, whole, error):
    """A sample of all points; the save itself is tried at every one above."""
    for nth in range(3, 1000, 11):
        place = tmp_path / str(nth)
        place.mkdir()
        with faulty(place, nth, error) as disk:
            try:
                ended = sit(place, save_after=(0, 3, 6, 9))
            except (OutputError, OSError, Dead):
                ended = None
        if not disk.struck:
            break
        if ended is None or not ended["saved"]:
            ended = sit(place, save_after=(0, 3, 6, 9))
        assert ended == whole, nth
        shutil.rmtree(place)
    assert nth > 50
