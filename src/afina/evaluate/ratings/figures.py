"""What the ratings say: averages with intervals, who is preferred, how far raters agree; as CSV and as preferences."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from afina.evaluate.metrics import bootstrap, mcnemar, wilson
from afina.evaluate.ratings.agreement import alpha, by_unit
from afina.evaluate.ratings.store import Rating, Turn


def summary(ratings: Sequence[Rating]) -> dict[str, Any]:
    """The figures, for the report and for machines."""
    scores = [rating for rating in ratings if rating.item.mode == "score"]
    pairs = [rating for rating in ratings if rating.item.mode == "pair"]
    return {
        "raters": sorted({rating.rater for rating in ratings}),
        "ratings": len(ratings),
        "scores": _averages(scores),
        "scores_alpha": alpha(by_unit((rating.item.key, rating.value) for rating in scores), "ordinal"),
        "pairs": _preferences(pairs),
        "pairs_alpha": alpha(by_unit((rating.item.key, rating.value) for rating in pairs), "nominal"),
    }


def _averages(ratings: Sequence[Rating]) -> dict[str, Any]:
    """The mean of 1 to 5 by system. An item that several people rated counts once, with their mean."""
    found = {}
    for system in dict.fromkeys(rating.item.system for rating in ratings):
        mine = [rating for rating in ratings if rating.item.system == system]
        means = [mean(values) for values in by_unit((rating.item.key, rating.value) for rating in mine)]
        counts = {str(value): sum(rating.value == value for rating in mine) for value in range(1, 6)}
        found[system] = {
            "mean": mean(means),
            "interval": bootstrap(means, (1, 5)),
            "ratings": len(mine),
            "items": len(means),
            "counts": counts,
        }
    return found


def _preferences(ratings: Sequence[Rating]) -> list[dict[str, Any]]:
    """Of each two systems that were set side by side, how often each was preferred."""
    found = []
    names = dict.fromkeys((rating.item.system, str(rating.item.other_system)) for rating in ratings)
    for left, right in names:
        mine = [rating for rating in ratings if (rating.item.system, rating.item.other_system) == (left, right)]
        votes = [sum(values) for values in by_unit((rating.item.key, rating.value) for rating in mine)]
        wins, losses = sum(vote > 0 for vote in votes), sum(vote < 0 for vote in votes)
        found.append(
            {
                "left": left,
                "right": right,
                "left_preferred": wins,
                "right_preferred": losses,
                "ties": len(votes) - wins - losses,
                "share_right": losses / (wins + losses) if wins + losses else None,
                "interval": list(wilson(losses, wins + losses)),
                "p_value": mcnemar(losses, wins),
                "ratings": len(mine),
                "items": len(votes),
            }
        )
    return found


def as_csv(ratings: Sequence[Rating]) -> str:
    """One line a rating."""
    columns = ("rater", "at", "mode", "task", "prompt", "system", "answer", "other_system", "other_answer")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, "value", "shown_first", "seconds"])
    for rating in ratings:
        item = rating.item
        texts = (item.mode, item.task, item.prompt, item.system, item.answer, item.other_system, item.other_answer)
        line = (rating.rater, rating.at, *texts, rating.value, rating.shown_first, f"{rating.seconds:.1f}")
        writer.writerow([_harmless(cell) for cell in line])
    return out.getvalue()


def _harmless(cell: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def preferences(ratings: Sequence[Rating]) -> str:
    """JSON lines of prompt, chosen and rejected, as preference training reads them: what most raters preferred, and of
    answers that were rated 1 to 5 each two whose means differ. Ties teach nothing and are left out."""
    rows = [*_from_pairs(ratings), *_from_scores(ratings)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _from_pairs(ratings: Sequence[Rating]) -> list[Mapping[str, Any]]:
    votes: dict[str, tuple[Rating, int]] = {}
    for rating in ratings:
        if rating.item.mode == "pair":
            before = votes.get(rating.item.key, (rating, 0))[1]
            votes[rating.item.key] = (rating, before + rating.value)
    return [
        _row(rating.item.before, rating.item.prompt, *_ordered(rating.item.answer, str(rating.item.other_answer), vote))
        for rating, vote in votes.values()
        if vote
    ]


def _from_scores(ratings: Sequence[Rating]) -> list[Mapping[str, Any]]:
    means: dict[tuple[tuple[Turn, ...], str], dict[str, list[int]]] = {}
    for rating in ratings:
        if rating.item.mode == "score":
            asked = rating.item.before, rating.item.prompt
            means.setdefault(asked, {}).setdefault(rating.item.answer, []).append(rating.value)
    rows = []
    for (before, prompt), answers in means.items():
        ranked = sorted(answers, key=lambda answer: mean(answers[answer]))
        if mean(answers[ranked[-1]]) > mean(answers[ranked[0]]):
            rows.append(_row(before, prompt, ranked[-1], ranked[0]))
    return rows


def _ordered(left: str, right: str, vote: int) -> tuple[str, str]:
    return (left, right) if vote > 0 else (right, left)


def _row(before: Sequence[Turn], prompt: str, chosen: str, rejected: str) -> Mapping[str, Any]:
    return {
        "prompt": [{"role": role, "content": content} for role, content in (*before, ("user", prompt))],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
