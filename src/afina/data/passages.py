"""Plain text to rows: whole paragraphs gathered into passages of some length, so that a novel can be shuffled, split
and packed. Nothing is lost and no word is cut; the last passage of a file ends it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from afina.data.encoding import decoded, open_text
from afina.data.lines import lines
from afina.data.row import Row, Shape, too_long

PASSAGE = 2000
"""Characters after which a passage ends at the next paragraph, about 500 tokens."""
LONGEST = 3000
"""Characters after which it ends at the next sentence, else at the next word."""
_SENTENCE = re.compile(r"[.!?…]['\"»”’)\]]*\s+")
_WORD = re.compile(r"\s+")


def passages(path: Path, shape: Shape) -> Iterator[Row]:
    """Each passage as {"text": ...}, with the line at which it begins."""
    text, begin, place = "", 1, 0
    with open_text(path, shape.encoding) as file:
        for number, offset, raw, whole in lines(file):
            if not whole:
                yield Row(None, number, offset, fault=too_long())
                return
            line = decoded(path, raw, number, offset).removesuffix("\r")
            if not text.strip():
                text, begin, place = "", number, offset
            if not line.strip() and len(text) >= PASSAGE:
                yield Row({"text": text.strip()}, begin, place, text.encode())
                text = ""
                continue
            text += line + "\n"
            while len(text) > LONGEST and (end := _end(text)):
                if passage := text[:end].strip():
                    yield Row({"text": passage}, begin, place, text[:end].encode())
                text, begin, place = text[end:], number, offset
    if text.strip():
        yield Row({"text": text.strip()}, begin, place, text.encode())


def _end(text: str) -> int:
    """Where a passage that is too long ends: after a sentence, else after a word; 0 where there is neither."""
    for pattern in (_SENTENCE, _WORD):
        found = pattern.search(text, PASSAGE)
        if found is not None and found.end() < len(text):
            return found.end()
    return 0
