"""Texts compared as people would: without case, accents, punctuation and odd spaces; code and JSON found in prose."""

import re
import unicodedata

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)


def normalised(text: str) -> str:
    """Lower case, no accents, letters and digits separated by single spaces.

    A sign before a number and a point inside one stay: -3 is not 3, nor is 1.5 the same as 15.
    """
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter)).replace("−", "-")
    kept = re.findall(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+", plain)
    return " ".join(kept)


def fenced(text: str) -> str | None:
    """What the first fenced block of a Markdown text holds, to the end where it is never closed; None without one."""
    found = _FENCE.search(text)
    return found.group(3) if found else None
