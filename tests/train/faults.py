"""The Nth thing that is asked of the disk fails, or the process dies there: for every N.

What Python asks is seen by an audit hook (open to write, mkdir, rename, remove, rmdir, chmod, truncate) and at
`os.fsync`; a file that safetensors writes counts as one operation, which leaves half of it.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from afina.train import checkpoint

WATCHED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


class Dead(BaseException):
    """The process was killed: from here on it asks nothing of the disk any more."""


class Disk:
    """Counts what is asked below `folder`; the `nth` raises `error`. Dead stays dead; an errno passes."""

    def __init__(self, folder: Path, nth: int, error: int | type[Dead]) -> None:
        self.folder, self.nth, self.error = str(folder), nth, error
        self.asked = 0

    @property
    def struck(self) -> bool:
        return self.asked >= self.nth

    def ask(self, path: str) -> None:
        if not path.startswith(self.folder):
            return
        self.asked += 1
        if self.error is Dead and self.asked >= self.nth:
            raise Dead
        if self.asked == self.nth:
            raise OSError(self.error, os.strerror(self.error), path)


_disk: Disk | None = None


def _hook(event: str, given: tuple) -> None:
    if _disk is None:
        return
    if event in WATCHED and isinstance(given[0], str | Path):
        _disk.ask(os.fspath(given[0]))
    elif event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR):
        _disk.ask(given[0])


sys.addaudithook(_hook)


@contextmanager
def faulty(folder: Path, nth: int, error: int | type[Dead]):
    """Inside the block the disk below `folder` is that faulty."""
    global _disk
    disk, sync, save = Disk(folder, nth, error), os.fsync, checkpoint.serialize_file

    def fsync(descriptor: int) -> None:
        disk.ask(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def save_file(tensors, file) -> None:
        try:
            disk.ask(str(file))
        except BaseException:
            save(tensors, file)
            os.truncate(file, file.stat().st_size // 2) if disk.error is not Dead else _halve(file)
            raise
        save(tensors, file)

    os.fsync, checkpoint.serialize_file, _disk = fsync, save_file, disk
    try:
        yield disk
    finally:
        os.fsync, checkpoint.serialize_file, _disk = sync, save, None


def _halve(file: Path) -> None:
    """As a process leaves it that dies while writing; the dead one itself may ask for nothing."""
    global _disk
    disk, _disk = _disk, None
    os.truncate(file, file.stat().st_size // 2)
    _disk = disk
