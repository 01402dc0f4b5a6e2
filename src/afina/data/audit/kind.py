"""What a class of faults is: an id that never changes, a severity, one sentence and one piece of advice."""

from enum import StrEnum
from typing import NamedTuple


class Severity(StrEnum):
    """What a fault means for its row."""

    ERROR = "error"
    """The row cannot be used: training stops and names it."""
    WARNING = "warning"
    """The row is learnt, and probably teaches what nobody wants."""
    NOTE = "note"
    """Worth knowing."""


class Kind(NamedTuple):
    """A class of faults."""

    id: str
    severity: Severity
    sentence: str
    advice: str
