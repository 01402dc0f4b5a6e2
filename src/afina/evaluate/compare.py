"""Two systems, the same samples: what was fixed, what was broken, and whether that can be chance. Knows no model."""

from collections.abc import Sequence
from typing import Any

from afina.evaluate.metrics import mcnemar, sign_flips
from afina.evaluate.tasks.kind import Mark
from afina.language import _

LIKELY_CHANCE = 0.05
"""Two systems are said to differ when chance alone would do so in fewer than one case in twenty."""


def compare(before: str, after: str, left: Sequence[Mark | None], right: Sequence[Mark | None]) -> dict[str, Any]:
    """What changed from one system to another, and one sentence that says whether that can be chance.

    Only samples that both have answered count. Right and wrong are compared by McNemar's exact test, scores by sign
    flips.
    """
    pairs = [(one, two) for one, two in zip(left, right, strict=True) if one is not None and two is not None]
    facts: dict[str, Any] = {"before": before, "after": after, "samples": len(pairs)}
    if not pairs:
        return {**facts, "p_value": 1.0, "verdict": _("No sample was answered by both.")}
    gain: float
    if all(mark.right is not None for pair in pairs for mark in pair):
        outcomes = [(bool(one.right), bool(two.right)) for one, two in pairs]
        fixed, broken = outcomes.count((False, True)), outcomes.count((True, False))
        chance = mcnemar(fixed, broken)
        facts |= {"fixed": fixed, "broken": broken}
        facts |= {"both_right": outcomes.count((True, True)), "both_wrong": outcomes.count((False, False))}
        gain = fixed - broken
        counted = _("{fixed} answers fixed, {broken} broken").format(fixed=fixed, broken=broken)
    else:
        scores = [(one.score, two.score) for one, two in pairs]
        chance = sign_flips([one for one, _two in scores], [two for _one, two in scores])
        better, worse = sum(two > one for one, two in scores), sum(one > two for one, two in scores)
        facts |= {"better": better, "worse": worse}
        gain = sum(two - one for one, two in scores)
        counted = _("better on {better} samples, worse on {worse}").format(better=better, worse=worse)
    facts |= {"p_value": chance, "verdict": _verdict(before, after, gain, chance, counted)}
    return facts


def _verdict(before: str, after: str, gain: float, chance: float, counted: str) -> str:
    if chance >= LIKELY_CHANCE:
        return _("No difference between {before} and {after} that chance would not explain (p = {chance:.2g}).").format(
            before=before, after=after, chance=chance
        )
    sentence = (
        _("{after} is better than {before}: {counted} (p = {chance:.2g}).")
        if gain > 0
        else _("{after} is worse than {before}: {counted} (p = {chance:.2g}).")
    )
    return sentence.format(before=before, after=after, counted=counted, chance=chance)


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which systems are compared: the first with every other, and tuned with what was made of it."""
    if len(names) < 2:
        return []
    first = [(names[0], name) for name in names[1:]]
    if names[0] == "tuned" or "tuned" not in names:
        return first
    return first + [("tuned", name) for name in names[1:] if name != "tuned"]
