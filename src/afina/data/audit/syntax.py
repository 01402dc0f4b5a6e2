"""Why a line is no JSON record, and at which of its bytes: the slow look at a line that the fast parser refused."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from afina.data.audit.letters import Fault
from afina.data.row import why_no_json

_LITERAL = re.compile(r"(?:True|False|None|undefined|NULL|Null|TRUE|FALSE)\b")
_NUMBER = re.compile(r"[+.]?\d|[+-]?\.\d|[-+]?0[0-9xXob]")
_LONE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_PAIR = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.", re.DOTALL)
PAGES = ("<!doctype", "<html", "<?xml", "<head", "<body", "<error")


def undecodable(raw: bytes, error: UnicodeDecodeError) -> Fault:
    """Why the bytes of a line are not UTF-8."""
    begin = error.start
    first, second = raw[begin], raw[begin + 1] if begin + 1 < len(raw) else 0
    shown = f"0x{first:02X}"
    if first == 0xED and 0xA0 <= second <= 0xBF:
        return Fault("cesu-surrogate", begin, min(begin + 3, len(raw)), raw[begin : begin + 3].hex(" "))
    if first in (0xC0, 0xC1) or (first == 0xE0 and 0x80 <= second < 0xA0) or (first == 0xF0 and 0x80 <= second < 0x90):
        return Fault("overlong", begin, min(begin + 2, len(raw)), raw[begin : begin + 2].hex(" "))
    if error.reason == "unexpected end of data":
        return Fault("cut-character", begin, len(raw), shown)
    return Fault(
        "not-utf8", begin, begin + 1, f"{shown} ({raw[begin : begin + 1].decode('cp1252', 'replace')} in cp1252)"
    )


def unreadable(raw: bytes) -> tuple[Any, list[Fault]]:
    """The value of a line, None where it has none, and its faults. `raw`: one line, without its end.

    Faults are in bytes of the line.
    """
    raw = raw.removesuffix(b"\r")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [undecodable(raw, error)]
    found: list[Fault] = []
    head = text.lstrip()[:40].lower()
    for kind, begins in (("html-page", PAGES), ("pointer-file", ("version https://git-lfs",))):
        if head.startswith(begins):
            return None, [Fault(kind, 0, len(raw), text.strip()[:40])]
    lone = _LONE.search(raw) if b"\\u" in raw else None
    if lone is not None and _is_open(raw, lone.start()):
        found.append(Fault("lone-surrogate", *lone.span(), lone.group().decode("ascii")))
    try:
        value = _decoder(found, text, raw)(text)
    except json.JSONDecodeError as error:
        fault = _syntax(text, error)
        begin = len(text[: fault.begin].encode("utf-8", "surrogatepass"))
        return None, [fault._replace(begin=begin, end=begin + max(fault.end - fault.begin, 0))]
    except RecursionError:
        return None, [Fault("deep", 0, len(raw))]
    except ValueError as error:
        run = re.search(rb"\d{1000,}", raw)
        begin, end = run.span() if run else (0, len(raw))
        return None, [Fault("huge-integer", begin, end, str(error)[:60])]
    return value, found


def _is_open(raw: bytes, begin: int) -> bool:
    """Whether the backslash at `begin` is not itself escaped."""
    before = raw[:begin]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0


def _decoder(found: list[Fault], text: str, raw: bytes) -> Callable[[str], Any]:
    def constant(name: str) -> None:
        begin = raw.find(name.encode())
        found.append(Fault("nan" if name == "NaN" else "infinity", begin, begin + len(name), name))

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            begin = raw.find(digits.encode())
            found.append(Fault("number-overflow", begin, begin + len(digits), digits[:40]))
        return value

    def pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(members)
        if len(value) != len(members):
            names = [name for name, _value in members]
            double = next(name for name in names if names.count(name) > 1)
            begin, end = _second(raw, double)
            found.append(Fault("duplicate-key", begin, end, double[:40]))
        return value

    return json.JSONDecoder(parse_constant=constant, parse_float=number, object_pairs_hook=pairs).decode


def _second(raw: bytes, name: str) -> tuple[int, int]:
    """Where a key stands again: a string of this value before a colon."""
    places = (
        match.span()
        for match in _PAIR.finditer(raw)
        if raw[match.end() : match.end() + 99].lstrip()[:1] == b":" and _decoded(match.group()) == name
    )
    _first, second = next(places, None), next(places, None)
    return second or (0, len(raw))


def _decoded(token: bytes) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _syntax(text: str, error: json.JSONDecodeError) -> Fault:
    """What kind of mistake the parser met."""
    at, rest = error.pos, text[error.pos :]
    sign = rest[:1]
    shown = rest[:24]
    if text.startswith("\ufeff"):
        return Fault("inner-bom", 0, 3)
    if error.msg.startswith("Unterminated string") or (not rest.strip() and "Extra" not in error.msg):
        return Fault("cut-row", at, len(text), text[-24:])
    if error.msg.startswith("Extra data"):
        two = rest.lstrip(" ,\t")[:1] in ("{", "[")
        return Fault("two-values" if two else "text-after", at, len(text), shown)
    if error.msg.startswith("Invalid control"):
        return Fault("raw-nul" if sign == "\x00" else "raw-control", at, at + 1, f"U+{ord(sign):04X}")
    if "escape" in error.msg:
        return Fault("bad-escape", at, at + 2, shown[:8])
    if sign == "\x00":
        return Fault("raw-nul", at, at + 1, "U+0000")
    if "railing comma" in error.msg or (sign in ("]", "}") and text[:at].rstrip().endswith(",")):
        return Fault("trailing-comma", at, at + 1, text[max(at - 12, 0) : at + 1])
    if rest.startswith(("//", "/*", "#")):
        return Fault("comment", at, at + 2, shown)
    if sign == "'":
        return Fault("single-quotes", at, at + 1, shown)
    if _LITERAL.match(rest):
        return Fault("foreign-literal", at, at + 4, shown[:9])
    if _NUMBER.match(rest) or (text[at - 1 : at].isdigit() and sign.isdigit()) or sign in (".", "+"):
        return Fault("bad-number", at, at + 1, shown[:16])
    if "property name" in error.msg and (sign.isalpha() or sign in ("_", "$")):
        return Fault("bare-key", at, at + 1, shown)
    return Fault("not-json", at, min(at + 1, len(text)), f"{why_no_json(error)}: {shown!r}")


def strange_numbers(value: Any) -> Iterator[tuple[str, str]]:
    """Class and text of every number that other programs read differently."""
    if isinstance(value, dict):
        for one in value.values():
            yield from strange_numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from strange_numbers(one)
    elif type(value) is int and not -(2**63) <= value < 2**64:
        yield "big-integer", str(value)[:40]


MINUS_ZERO = re.compile(rb"-0\s*[,}\]]")
"""What may be one, in a text of JSON."""
_ZERO = re.compile(rb"[:\[,]\s*(-0)(?=\s*[,}\]])")


def minus_zero(raw: bytes) -> Iterator[Fault]:
    """The first minus zero that is a value: an even number of quotation marks stands before it."""
    if b"-0" in raw:
        for found in _ZERO.finditer(raw):
            if quotes(raw[: found.start()]) % 2 == 0:
                yield Fault("negative-zero", *found.span(1), "-0")
                return


def strings(value: Any) -> int:
    """How many strings the JSON text of a value holds, keys included: each is between two quotation marks."""
    kind = type(value)
    if kind is str:
        return 1
    if kind is dict:
        return len(value) + sum(map(strings, value.values()))
    if kind is list:
        return sum(map(strings, value))
    return 0


def quotes(raw: bytes) -> int:
    """Quotation marks of a JSON text that are not escaped."""
    return raw.count(b'"') - escaped_quotes(raw)


def escaped_quotes(raw: bytes) -> int:
    """Quotation marks of a JSON text that are."""
    return (raw.replace(b"\\\\", b"") if b"\\\\" in raw else raw).count(b'\\"')


def quotes_in(text: bytes) -> int:
    """`quotes` of many lines together. text: these with their line ends."""
    codes = np.frombuffer(text, np.uint8)
    after = codes[np.flatnonzero(codes == ord("\\")) + 1]
    if (after == ord("\\")).any():
        return int(quotes_of(text, np.zeros(1, np.int64))[0])
    return int(np.count_nonzero(codes == ord('"')) - np.count_nonzero(after == ord('"')))


def quotes_of(text: bytes, begins: np.ndarray) -> np.ndarray:
    """(lines,) int64: `quotes` of each line. text: lines with their line ends; begins: (lines,) where each begins."""
    codes = np.frombuffer(text, np.uint8)
    places = np.flatnonzero(codes == ord('"'))
    edges = np.append(begins, codes.size)
    counts = np.diff(np.searchsorted(places, edges))
    if b"\\" in text:
        after = places[codes[places - 1] == ord("\\")]
        odd, back = np.ones(after.size, np.bool_), after - 1
        behind = np.arange(after.size)  # where one more backslash stands before those that are counted
        while (behind := behind[codes[back[behind] - 1] == ord("\\")]).size:
            back[behind] -= 1
            odd[behind] ^= True
        counts -= np.diff(np.searchsorted(after[odd], edges))
    return counts


def place(raw: bytes, text: str, begin: int, end: int) -> tuple[int, int]:
    """The bytes of a JSON line that hold characters `begin` to `end` of the string `text`; the line where none does."""
    written = json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")
    plain = raw.find(written)
    if plain >= 0 and "\\" not in text and '"' not in text:  # found as it would be written anew
        return _within(written, plain, begin, end)
    part = text[begin:end]
    tokens = [(match, decoded) for match in _PAIR.finditer(raw) if (decoded := _decoded(match.group())) is not None]
    for match, decoded in tokens:
        if decoded == text:
            return _within(match.group(), match.start(), begin, end)
    for match, decoded in tokens:  # a text made of several strings of the row: the first that holds the part
        if part and part in decoded:
            begin = decoded.index(part)
            return _within(match.group(), match.start(), begin, begin + len(part))
    return 0, len(raw)


def _within(token: bytes, start: int, begin: int, end: int) -> tuple[int, int]:
    """The bytes of characters `begin` to `end` of a JSON string at `start`, escapes counted as what they stand for."""
    inside, first = token[1:-1].decode("utf-8", "surrogatepass"), start + 1
    edges = []
    for count in (begin, end):
        at = made = 0  # characters of the token, and what they stand for, up to an edge of it
        while (escape := inside.find("\\", at)) >= 0 and made + escape - at < count:
            made += escape - at + 1
            at = escape + len(_ESCAPE.match(inside, escape).group())  # type: ignore[union-attr]
        at += min(count - made, len(inside) - at)
        edges.append(first + len(inside[:at].encode("utf-8", "surrogatepass")))
    return edges[0], edges[1]
