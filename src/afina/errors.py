"""The error tree. Each message says what happened, where, and what to do next.

    AfinaError                  1   anything below, and nothing else, is shown without a traceback
    ├── RecipeError             2   the recipe, a flag or an override is wrong
    ├── DataError               3   a data file, a row or a label is wrong
    ├── ModelError              4   a model, tokenizer, adapter or template cannot be used
    ├── OutputError             5   the run folder or a file in it cannot be written, or is already there
    ├── ResourceError           6   too little memory or disk, or a package or device is missing
    ├── ProofError              7   a check of our own failed: what was made is not what was trained
    └── Interrupted           130   the user stopped the work; nothing half-written was left

The numbers are the exit statuses of the command line (128 + signal for a signal); they are part of the interface.
"""

import errno
import os
from pathlib import Path

from afina.language import _


class AfinaError(Exception):
    """A failure the user can act on.

    `message` is one sentence saying what happened; `hint` the next step; `file`, `line` and `column` (from 1) where.
    `key` is the recipe's key that is to be changed, which only who has read the file can find the place of.
    """

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        file: Path | str | None = None,
        line: int | None = None,
        column: int | None = None,
        key: tuple[str | int, ...] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.file = str(file) if file is not None else None
        self.line = line
        self.column = column
        self.key = key

    @property
    def where(self) -> str:
        """`file:line:column` as editors understand it, as far as it is known."""
        parts = [str(part) for part in (self.file, self.line, self.column) if part is not None]
        return ":".join(parts)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class RecipeError(AfinaError):
    """The recipe, a flag or an override is wrong."""

    exit_status = 2


class DataError(AfinaError):
    """A data file, a row or a label is wrong."""

    exit_status = 3


class ModelError(AfinaError):
    """A model, tokenizer, adapter or template cannot be used."""

    exit_status = 4


class OutputError(AfinaError):
    """The run folder or a file in it cannot be written, or is already there."""

    exit_status = 5


class ResourceError(AfinaError):
    """Too little memory or disk, or a package or device is missing."""

    exit_status = 6


class ProofError(AfinaError):
    """A check of our own failed: what was made is not what was trained."""

    exit_status = 7


class Interrupted(AfinaError):
    """The user stopped the work; nothing half-written was left."""

    def __init__(self, message: str, *, signal_number: int = 2, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_status = 128 + signal_number


def reason_of(error: OSError) -> str:
    """What the operating system refused: what is usual in the language of messages, the rest as it says it."""
    usual = {
        errno.ENOENT: _("No such file or directory"),
        errno.EACCES: _("Permission denied"),
        errno.EPERM: _("Operation not permitted"),
        errno.EISDIR: _("Is a directory"),
        errno.ENOTDIR: _("Not a directory"),
        errno.EROFS: _("Read-only file system"),
        errno.ENAMETOOLONG: _("File name too long"),
        errno.EIO: _("Input/output error"),
    }
    said = os.strerror(error.errno) if error.errno else error.strerror or str(error)
    return usual.get(error.errno or 0, said)
