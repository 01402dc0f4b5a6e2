"""The only file that writes anything that must survive.

A file or folder appears under its final name complete, or not at all: temporary name beside it, fsync, rename, fsync
of the parent. A log grows by whole lines. Knows nothing of what the bytes mean.

The order matters (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014): a rename may reach the disk
before the bytes it names unless these were synced first, and the rename itself is only safe once the parent is.
"""

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil

from afina.errors import AfinaError, Interrupted, OutputError, reason_of
from afina.language import _

PARTIAL = ".partial"
"""What a temporary name contains, then the writer's machine and process; `sweep` removes what a killed process left."""
CLOCK_S = 2.0
"""A process that began so long after the last change of a file did not write it, though it has its writer's id."""
KEY = "key"
"""The file beside an unfinished folder that says what it is to become."""
LOCK = "lock"
"""The file in a claimed folder that says who holds it."""
PIECE = 2**16
"""Bytes that are read at once where the end of a line is looked for."""
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either what it held before or all of it. Raises OutputError."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_partial_prefix(path), dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        _sync(path.parent)


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, in UTF-8 with the line endings as given."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`: readable JSON, keys in the order given, non-ASCII text as it is."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises OutputError when `path` exists already, cannot be written, or the disk is full.
    """
    if os.path.lexists(path):
        raise _exists(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_partial_prefix(path), dir=path.parent))
        try:
            yield temporary
            _sync_tree(temporary)
            temporary.chmod(0o755)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


@contextmanager
def taken_up(path: Path, key: str) -> Iterator[Path]:
    """As `new_folder`, but what an interrupted or killed process left of it is found in the yielded folder again.

    `key` says what is being made: what was left of anything else is thrown away. A failure leaves nothing, an
    interruption leaves all. Raises OutputError as `new_folder` does, and where another process is at the same work.
    """
    if os.path.lexists(path):
        raise _exists(path)
    place = path.with_name(f".{path.name}.unfinished")
    made, said = place / "made", f"{key}\n"
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(place)
        try:
            if not (place / KEY).is_file() or (place / KEY).read_text("utf-8") != said:
                remove(made)
                write_text(place / KEY, said)
            made.mkdir(exist_ok=True)
            sweep(made)
            yield made
            _sync_tree(made)
            made.rename(path)
            shutil.rmtree(place, ignore_errors=True)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, Interrupted):
                shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            os.close(lock)
        _sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes `path` when the block ends well, and vanishes when it does not.

    For files too large to hold as bytes. Raises OutputError when `path` exists already, cannot be written, or the disk
    is full.
    """
    if os.path.lexists(path):
        raise _exists(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_partial_prefix(path), dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync(path.parent)


class Log:
    """A file of JSON lines that only grows. Each line is written whole and at once, so no reader sees half of one; what
    a power failure left of a line is taken back, or the next line would be a part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b", buffering=0)
            whole = _whole_lines(self._file)
            if whole < os.fstat(self._file.fileno()).st_size:
                self._file.truncate(whole)

    def append(self, record: dict[str, Any]) -> bytes:
        """Add one record as one line, and return it; on a full disk none of it. Raises OutputError."""
        line = whole_line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        with _explained(self.path):
            whole = os.fstat(self._file.fileno()).st_size
            try:
                while line:  # near the end of a disk, less may be written than was asked for
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(whole)
                raise
        return whole_line

    def sync(self) -> int:
        """Let all of it reach the disk; returns its length in bytes."""
        with _explained(self.path):
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Take back everything after the first `length` bytes."""
        with _explained(self.path):
            self._file.truncate(length)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _whole_lines(file: IO[bytes]) -> int:
    """How many bytes of a file its whole lines take."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - PIECE)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            return start + found
        end = start
    return 0


def sweep(folder: Path) -> list[Path]:
    """Remove what dead processes of this machine left half-written directly in `folder`; returns what was removed."""
    left = [path for path in sorted(folder.glob(f".*{PARTIAL}-*")) if not _writer_lives(path)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return left


def remove(path: Path) -> None:
    """Take a file or folder away at once, if it is there: half of it is never seen under its name."""
    with _explained(path):
        if not os.path.lexists(path):
            return
        going = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(4)}")
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True) if going.is_dir() and not going.is_symlink() else going.unlink()


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where there is none, for this process alone; an empty one vanishes at the end.

    The operating system's lock ends with its process, so nothing that a killed one left is in the way. Raises
    OutputError naming the holder.
    """
    with _explained(folder):
        lock = _lock(folder)
    try:
        with _explained(folder):
            who = {
                "pid": os.getpid(),
                "host": platform.node(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            os.ftruncate(lock, 0)
            os.pwrite(lock, json.dumps(who).encode(), 0)
        yield
    finally:
        try:
            with suppress(OSError):  # a name that stays is in nobody's way
                (folder / LOCK).unlink(missing_ok=True)
        finally:
            os.close(lock)
        with suppress(OSError):
            folder.rmdir()


def _lock(folder: Path) -> int:
    """An open, locked LOCK in `folder`. On a disk that knows no locks, a process of this machine is looked for."""
    import fcntl  # not on Windows

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # its last holder took the empty folder away between these two lines
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except OSError as error:
            held = error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _holder_lives(_holder(lock))
        if held:
            who = _holder(lock)
            os.close(lock)
            raise OutputError(
                _("{folder} is in the hands of process {pid} on {host} since {since}.").format(folder=folder, **who),
                hint=_("Wait for it, or end it; or choose another folder with --out."),
            )
        with suppress(FileNotFoundError):
            if (folder / LOCK).stat().st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)  # its last holder took the file away: lock the new one


def _holder(lock: int) -> dict[str, Any]:
    try:
        who = json.loads(os.pread(lock, 2**12, 0))
        return {key: str(who[key]) for key in ("pid", "host", "since")}
    except (ValueError, KeyError, TypeError):
        return {"pid": "?", "host": "?", "since": "?"}


def _holder_lives(who: dict[str, Any]) -> bool:
    return who["host"] == platform.node() and who["pid"].isdigit() and psutil.pid_exists(int(who["pid"]))


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path` or will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _partial_prefix(path: Path) -> str:
    return f".{path.name}{PARTIAL}-{_machine()}-{os.getpid()}-"


@cache
def _machine() -> str:
    """A short name of this machine: on a shared disk a process id says nothing about the processes of another one."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _writer_lives(path: Path) -> bool:
    """Whether the process that named `path` may still be at work. What another machine left is never judged."""
    machine, _dash, rest = path.name.rpartition(f"{PARTIAL}-")[2].partition("-")
    process = rest.partition("-")[0]
    if machine != _machine() or not process.isdigit():
        return True
    try:
        born = psutil.Process(int(process)).create_time()
        return born <= path.lstat().st_mtime + CLOCK_S
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.Error:
        return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _folders, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the refusals of the operating system to write `path` into one sentence with the next step."""
    try:
        yield
    except (AfinaError, BrokenPipeError):  # whoever read our output is gone: that is no matter of the disk
        raise
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(path) from error
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and os.path.lexists(path):
            raise _exists(path) from error
        if error.errno in REFUSED and _is_beside(error.filename, path):
            raise OutputError(
                _("{path} cannot be written: {reason}.").format(path=path, reason=reason_of(error)),
                hint=_("Choose another place with --out, or change its permissions."),
            ) from error
        if isinstance(error, FileNotFoundError) or error.errno is None or not _is_beside(error.filename, path):
            raise
        raise OutputError(
            _("Writing {path} failed: {reason}.").format(path=path, reason=reason_of(error)),
            hint=_("Check the disk, then run the same command again."),
        ) from error
    except Exception as error:
        # Libraries written in Rust or C++ (safetensors, gguf, llama.cpp) tell of a full disk in words alone.
        if any(os.strerror(number) in str(error) for number in FULL):
            raise _disk_full(path) from error
        raise


def _is_beside(refused: str | bytes | int | None, path: Path) -> bool:
    """Whether the file that was refused is `path`, beside it or below it: a file elsewhere was only to be read."""
    if not isinstance(refused, str):
        return True
    place, folder = Path(refused).absolute(), path.absolute().parent
    return place.is_relative_to(folder) or folder.is_relative_to(place)


def _disk_full(path: Path) -> OutputError:
    return OutputError(
        _("The disk is full while writing {path}.").format(path=path),
        hint=_("Free some space, or choose another place with --out. Nothing half-written was left."),
    )


def _exists(path: Path) -> OutputError:
    return OutputError(
        _("{path} exists already.").format(path=path), hint=_("Choose another name, or remove it first.")
    )
