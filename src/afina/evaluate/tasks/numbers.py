"""Numbers as people write them: 1,234.5 and 1.234,5, 80 000, $3, 50 %, 3/4. Exact fractions, never floats."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

Convention = Literal["auto", "en", "es"]

_BODY = r"(?:\d{1,3}(?:[ \u00a0\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*|[.,]\d+)"
NUMBER = re.compile(
    rf"(?<![\w.,])(?P<sign>[-+−]\s?)?(?:[$€£]\s?)?(?P<top>{_BODY})(?:\s?/\s?(?P<bottom>{_BODY}))?(?P<percent>\s?\\?%)?"
)
_EN = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)?(?:\.(\d+))?")
_ES = re.compile(r"(\d{1,3}(?:\.\d{3})+|\d+)?(?:,(\d+))?")
_GROUPED = re.compile(r"\d{1,3}([.,])\d{3}(?:\1\d{3})*")
LONGEST = 400
"""Digits of a number that is read; nobody's answer has more, and arithmetic on a million digits takes for ever."""


def readings(found: re.Match[str], convention: Convention = "auto") -> set[Fraction]:
    """The values a match of NUMBER may have: one, or two where the convention decides (1.234)."""
    tops = _values(found["top"], convention)
    bottoms = _values(found["bottom"], convention) if found["bottom"] else {Fraction(1)}
    sign = -1 if (found["sign"] or "").strip() in ("-", "−") else 1
    values = {sign * top / bottom for top in tops for bottom in bottoms if bottom}
    return values | {value / 100 for value in values} if found["percent"] else values


def preferred(text: str, convention: Convention = "auto") -> Fraction | None:
    """The value of a text that is one number: a reference answer, of which there must be one reading.

    Where both conventions can read it, groups of three digits are thousands.
    """
    found = NUMBER.fullmatch(text.strip().rstrip("."))
    if not found:
        return None
    if convention == "auto" and _GROUPED.fullmatch(found["top"]) and not found["bottom"]:
        value = Fraction(int(re.sub(r"\D", "", found["top"])))
        return -value if (found["sign"] or "").strip() in ("-", "−") else value
    values = readings(found, convention)
    return max(values, key=abs, default=None)


def _values(body: str, convention: Convention) -> set[Fraction]:
    body = re.sub(r"[ \u00a0\u202f'’]", "", body)
    if len(body) > LONGEST:
        return set()
    found = set()
    for name, pattern in (("en", _EN), ("es", _ES)):
        if convention in (name, "auto") and (match := pattern.fullmatch(body)):
            whole, rest = re.sub(r"\D", "", match[1] or "0"), match[2] or ""
            found.add(Fraction(int(whole + rest), 10 ** len(rest)))
    return found


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_STEP = re.compile(
    r"(?<![\w.,])([($€£\d.,][\d.,\s$€£()+\-−*×·x/÷%]*?)=\s*([-−]?[$€£]?\s?\d[\d.,]*+(?:\s?/\s?\d++(?!\s*=))?)"
    r"(?!\s*[-+−*×·÷]\s*[$€£]?[\d(])"
)


_BEGUN = re.compile(r"(?:[-+−*×·/÷]|(?<=\s)x)\s*$")
"""A sign before a calculation: what it begins with is left out."""


def steps(text: str, convention: Convention = "auto") -> list[bool]:
    """Of every calculation that a text shows (16 - 3 - 4 = 9), whether it is right; what is no calculation is left out.

    GSM8K's annotations <<16-3-4=9>> repeat what stands beside them, and are taken out.
    """
    found = []
    text = re.sub(r"<<[^<>]*>>", "", text)
    for match in _STEP.finditer(text):
        if _BEGUN.search(text[max(0, match.start() - 20) : match.start()]):
            continue  # 60 students x 2/3 = 40: the words stand between the numbers
        result = NUMBER.match(match[2].rstrip(".,"))
        values = _calculated(match[1], convention)
        if result and values:
            # A quotient is often rounded: right to the digits that are shown.
            shown = max((len(part) for part in re.findall(r"[.,](\d{1,2})(?!\d)", match[2])), default=0)
            slack = Fraction(1, 2 * 10**shown) if shown else Fraction(0)
            wanted = readings(result, convention)
            found.append(any(abs(value - goal) <= slack for value in values for goal in wanted))
    return found


def _calculated(text: str, convention: Convention) -> set[Fraction]:
    """The value of an expression of numbers and + - * /, in each convention that can read all of it."""
    values: set[Fraction] = set()
    plain = re.sub(r"[×·]|(?<=[\d)\s])x(?=[\s(\d$])", "*", text.replace("−", "-").replace("÷", "/"))
    plain = re.sub(r"[$€£]", "", plain)
    if not re.search(r"[\d)]\s*[-+*/]\s*[\d(]", plain) or len(plain) > 200:
        return values
    for name in ("en", "es") if convention == "auto" else (convention,):
        dotted = _spelled(plain, name)
        if dotted is None:
            continue
        try:
            values.add(_value(ast.parse(dotted, mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            continue
    return values


def _spelled(text: str, convention: str) -> str | None:
    """The expression with Python's numbers; None where one is not of the convention."""
    good = True

    def one(found: re.Match[str]) -> str:
        nonlocal good
        values = _values(found[0].rstrip(".,"), "en" if convention == "en" else "es")
        good = good and bool(values)
        value = next(iter(values), Fraction(0))
        return f"({value.numerator}/{value.denominator})"

    spelled = re.sub(r"\d[\d.,]*", one, text.replace("%", "/100"))
    return spelled.strip() if good else None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
    raise ValueError("not arithmetic")
