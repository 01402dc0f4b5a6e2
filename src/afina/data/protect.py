"""What of a text a translation must leave as it is, byte for byte: code, formulas, addresses, markup, keys of JSON.

A text becomes parts, which put together are the text again. `Unit`s are what is translated, with marks such as ⟦1⟧ in
the place of what stays inside them; everything else stays. That nothing was lost is proved on the result itself
(`proof`), which is taken apart anew, however it came about.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt

from afina.language import _

BLOCKS = ("fence", "code_block", "html_block")
_PAIRS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("{{", "}}"), ("<<", ">>"))
"""What stays from an opening to the next closing: formulas, placeholders of templates, GSM8K's sums."""
_INLINE = re.compile(
    r"(?P<url>(?:(?:https?|ftp)://|www\.)(?:[^\s<>\"'()\]]|\([^\s<>\"'()]*\))+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}\w)"
    r"|(?P<target>(?<=\]\()[^()\s]+(?=\)))"
    r"|(?P<tag></?[A-Za-z][^<>\n]{0,400}>)"
    r"|(?P<sum>\$(?=[^\s$])[^$\n]{0,400}(?<=[^\s\\])\$(?!\d))"
    r"|(?P<slot>\{[A-Za-z_][\w.]{0,60}\}|%\([A-Za-z_]\w{0,60}\)[sd])"
)
_SIGN = re.compile("[⟦⟧]")
"""Half a mark that the text itself holds: looked for apart, as a piece that is not kept in the end may swallow it."""
_MARK = re.compile("⟦([0-9]{1,6})⟧")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?')
_TEXT = re.compile(r"[^\W\d_]")
"""A letter: what has none needs no translation."""
_TICKS = re.compile("`+")


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece to translate. `kept[n]` stands where `text` has the mark ⟦n + 1⟧. quoted: it stands in a JSON string."""

    text: str
    kept: tuple[str, ...]
    quoted: bool = False

    def restored(self, translated: str) -> str | None:
        """The translation with what was kept in its places; None unless every mark is there exactly once."""
        marks = [int(number) for number in _MARK.findall(translated)]
        if sorted(marks) != list(range(1, len(self.kept) + 1)) or len(marks) != translated.count("⟦"):
            return None
        text = json.dumps(translated, ensure_ascii=False)[1:-1] if self.quoted else translated
        return _MARK.sub(lambda match: self.kept[int(match.group(1)) - 1], text)


def parts(text: str) -> list[str | Unit]:
    """What stays, and what is to be translated, in order."""
    if (found := _of_json(text)) is not None:
        return found
    made: list[str | Unit] = []
    for piece, stays in _blocks(text):
        if stays:
            made.append(piece)
        else:
            made += _paragraphs(piece)
    return made


def proof(text: str, translated: str) -> str:
    """Why the translation is not the text with other words; "" when all that must stay did."""
    before, after = _kept(text), _kept(translated)
    if before[0] != after[0]:
        return _("a block of code, or a key or value of JSON, was changed")
    lost, came = Counter(before[1]) - Counter(after[1]), Counter(after[1]) - Counter(before[1])
    if lost or came:
        odd = next(iter(lost or came))
        return _("“{piece}” was lost or changed").format(piece=odd[:60])
    return ""


def _kept(text: str) -> tuple[list[str], list[str]]:
    """What stays in a text: blocks in their order, and what stands inside paragraphs in any order."""
    found = parts(text)
    blocks = [part for part in found if isinstance(part, str) and part.strip()]
    return blocks, [piece for part in found if isinstance(part, Unit) for piece in part.kept]


def _of_json(text: str) -> list[str | Unit] | None:
    """The parts of a JSON document: values of more than one word are translated. None for what is none."""
    if text.strip()[:1] not in ("{", "["):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    made: list[str | Unit] = []
    position = 0
    for match in _STRING.finditer(text):
        inside = match.group()[1:-1]
        if match.group(1) or len(inside.split()) < 2:
            continue
        made.append(text[position : match.start() + 1])
        made.append(_unit(json.loads(match.group()), quoted=True))
        position = match.end() - 1
    return [*made, text[position:]]


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Runs of lines, and whether they stay as they are: blocks of code and of HTML, however deep in lists."""
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)  # the lines of Markdown
    stays = [False] * len(lines)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in BLOCKS and token.map is not None:
            for line in range(*token.map):
                stays[line] = True
    start = 0
    for end in range(1, len(lines) + 1):
        if end == len(lines) or stays[end] != stays[start]:
            yield "".join(lines[start:end]), stays[start]
            start = end


def _paragraphs(text: str) -> Iterator[str | Unit]:
    """Paragraphs as units; the white space around them, and what has no letter, stays."""
    for piece in re.split(r"(\n[ \t]*\n\s*)", text):
        bare = piece.strip()
        if not bare or not _TEXT.search(bare):
            yield piece
            continue
        unit = _unit(bare)
        if not _TEXT.search(_MARK.sub("", unit.text)):
            yield piece
            continue
        begin = piece.index(bare)
        yield piece[:begin]
        yield unit
        yield piece[begin + len(bare) :]


def _unit(text: str, *, quoted: bool = False) -> Unit:
    kept: list[str] = []
    made: list[str] = []
    position = 0
    for begin, end in _spans(text):
        made.append(text[position:begin])
        inside = text[begin:end]
        kept.append(json.dumps(inside, ensure_ascii=False)[1:-1] if quoted else inside)
        made.append(f"⟦{len(kept)}⟧")
        position = end
    return Unit("".join([*made, text[position:]]), tuple(kept), quoted)


def _spans(text: str) -> list[tuple[int, int]]:
    """What stays inside a paragraph, in order, none inside another."""
    found = [*_code(text), *_paired(text)]
    found += [match.span() for pattern in (_INLINE, _SIGN) for match in pattern.finditer(text)]
    chosen: list[tuple[int, int]] = []
    for begin, end in sorted(found, key=lambda span: (span[0], -span[1])):
        if not chosen or begin >= chosen[-1][1]:
            chosen.append((begin, end))
    return chosen


def _code(text: str) -> Iterator[tuple[int, int]]:
    """Code between as many backticks before as after (CommonMark 6.1)."""
    runs = [(match.start(), match.end()) for match in _TICKS.finditer(text)]
    places: dict[int, list[int]] = {}
    for begin, end in runs:
        places.setdefault(end - begin, []).append(begin)
    position = 0
    for begin, end in runs:
        if begin < position:
            continue
        same = places[end - begin]
        following = bisect_left(same, end)
        if following < len(same):
            position = same[following] + end - begin
            yield begin, position


def _paired(text: str) -> Iterator[tuple[int, int]]:
    for opening, closing in _PAIRS:
        position = 0
        while (begin := text.find(opening, position)) >= 0:
            end = text.find(closing, begin + len(opening))
            if end < 0:
                break
            position = end + len(closing)
            yield begin, position


def joined(made: Sequence[str | Unit], translated: Sequence[str]) -> str | None:
    """The parts put together, units replaced by their translations; None when one lost a mark."""
    words = iter(translated)
    texts = [part if isinstance(part, str) else part.restored(next(words)) for part in made]
    return None if any(text is None for text in texts) else "".join(text for text in texts if text is not None)
