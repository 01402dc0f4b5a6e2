"""Which samples are kept back for validation or test: decided by seed and content, never by the order of rows.

Equal and nearly equal samples stay together, so that nothing is asked that was all but learnt. Where the answers are
classes, each class is dealt out in the same shares.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afina.data.audit.chat import KEYS, unread
from afina.data.classes import classes_of
from afina.data.conversation import Sample, row_of
from afina.data.near import groups
from afina.data.row import line_of
from afina.errors import DataError, RecipeError
from afina.language import _

CLUSTER, CLUSTER_SHARE = 3, 0.05
"""Samples that are nearly the same are kept together up to so many, and such a share of all: where more are alike, it
is the wording around them that they have in common."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file to be made. `amount`: below 1 a share of all samples, from 1 a number of them, None what is left."""

    name: str
    amount: float | int | None = None


def parts_of(text: str) -> list[Part]:
    """Parts as the command line writes them: train,validation=0.1,test=200. Raises RecipeError."""
    parts = [_part(word.strip()) for word in text.split(",")]
    if len({part.name for part in parts}) < len(parts):
        raise RecipeError(_("A part is named twice in {text}.").format(text=text), hint=_("Name each part once."))
    if sum(part.amount is None for part in parts) != 1:
        raise RecipeError(
            _("Exactly one part must be without a number: it takes what is left."),
            hint=_("Write --into train,validation=0.1,test=200."),
        )
    return parts


def _part(word: str) -> Part:
    name, equals, number = word.partition("=")
    try:
        amount = None if not equals else float(number) if "." in number else int(number)
    except ValueError:
        amount = 0
    whole = isinstance(amount, float) and not 0 < amount < 1
    if (
        whole
        or not name.replace("-", "").replace("_", "").isalnum()
        or (amount is not None and not 0 < amount < 10**12)
    ):
        raise RecipeError(
            _("{word} is no part.").format(word=repr(word)),
            hint=_("Write NAME, NAME=0.1 for a share or NAME=200 for so many rows."),
        )
    return Part(name, amount)


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, validation), each in the order given: what `deal` makes of the share. Raises DataError."""
    if share == 0 or not samples:
        return samples, []
    validation, train = Part("validation", share), Part("train")
    dealt = deal(samples, [validation, train], seed)
    return dealt[train], dealt[validation]


def deal(samples: Sequence[Sample], parts: Sequence[Part], seed: int) -> dict[Part, list[Sample]]:
    """The samples of each part, in the order given; equal and nearly equal samples lie in one part.

    Each part with an amount takes the samples with the smallest keyed hashes, class by class, of those that the parts
    before it left. A sample that occurs more often than there is room left is passed over. Raises
    DataError where nothing is left for the part without an amount.
    """
    keys = _keys(samples, seed)
    classes = [sample.answer.strip() for sample in samples] if classes_of(samples) else [""] * len(samples)
    sizes = Counter(keys)
    owner: dict[bytes, Part] = {}
    rest = next(part for part in parts if part.amount is None)
    for part in parts:
        if part.amount is not None:
            wanted = max(1, round(part.amount * len(samples))) if part.amount < 1 else int(part.amount)
            free = {key: kind for key, kind in zip(keys, classes, strict=True) if key not in owner}
            owner.update(dict.fromkeys(_smallest(free, sizes, wanted), part))
    dealt: dict[Part, list[Sample]] = {part: [] for part in parts}
    for sample, key in zip(samples, keys, strict=True):
        dealt[owner.get(key, rest)].append(sample)
    if not dealt[rest]:  # a part with an amount takes one at least
        raise DataError(
            _(
                "{samples} samples are too few: none is left for {part}. Equal and nearly equal ones stay together, so "
                "that there are {groups} to be dealt out."
            ).format(samples=len(samples), part=rest.name, groups=len(sizes)),
            hint=_("Add samples, or keep fewer back: data.validation in a recipe, --into of afina data split."),
        )
    return dealt


def _keys(samples: Sequence[Sample], seed: int) -> list[bytes]:
    """The keyed hash of each sample, of those that are nearly the same the smallest of theirs."""
    own = [sample.digest(salt=f"split {seed}") for sample in samples]
    owners = groups(_content(sample) for sample in samples).tolist()
    members: dict[int, set[bytes]] = defaultdict(set)
    for key, owner in zip(own, owners, strict=True):
        members[owner].add(key)
    most = max(CLUSTER, len(set(own)) * CLUSTER_SHARE)
    together = {owner: min(keys) for owner, keys in members.items() if len(keys) <= most}
    return [together.get(owner, key) for key, owner in zip(own, owners, strict=True)]


def _content(sample: Sample) -> str:
    """What is asked and answered; a system message is the same in many samples."""
    return "\n".join(message.content for message in sample.messages if message.role != "system")


def _smallest(free: dict[bytes, str], sizes: Counter[bytes], wanted: int) -> set[bytes]:
    """The smallest hashes of each class that together stand for at most `wanted` samples, each class in proportion.

    The rarest hash where none is so rare. `free`: each hash and its class.
    """
    members: dict[str, list[bytes]] = defaultdict(list)
    for key in sorted(free):
        members[free[key]].append(key)
    chosen: set[bytes] = set()
    for kind, quota in _quotas({kind: sum(sizes[key] for key in members[kind]) for kind in members}, wanted).items():
        for key in members[kind]:
            if sizes[key] <= quota:
                chosen.add(key)
                quota -= sizes[key]
    if not chosen and free:
        chosen = {min(free, key=lambda key: (sizes[key], key))}
    return chosen


def _quotas(counts: dict[str, int], wanted: int) -> dict[str, int]:
    """`wanted` dealt out in proportion to the counts, by largest remainders; no class gets more than it has."""
    total = max(sum(counts.values()), 1)
    wanted = min(wanted, total)
    exact = {kind: wanted * count / total for kind, count in counts.items()}
    quotas = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(counts, key=lambda kind: (quotas[kind] - exact[kind], kind))
    for kind in by_remainder[: wanted - sum(quotas.values())]:
        quotas[kind] += 1
    return quotas


def written(sample: Sample, value: Any, dialect: str) -> str:
    """A row as a line that reads back as the same sample, with all it has besides: ids, sources, notes.

    Messages stay as they are; rows of other dialects become messages, or a text, and keep what was not read. A row
    that a mapping read is kept whole beside them, under `row`.
    """
    row = value if isinstance(value, dict) else {}
    if dialect == "messages":
        if len(row["messages"]) < len(sample.messages):  # the recipe's system message stands before them
            row = {**row, "messages": [*row_of(sample)["messages"][:1], *row["messages"]]}
    else:
        beside = {key: row[key] for key in row if key in unread(row, dialect)}
        if dialect not in KEYS or any(key in beside for keys in KEYS.values() for key in keys):
            beside = {"row": value}  # spread out, its keys could be taken for those of a dialect
        row = {"text": sample.answer, **beside} if sample.is_text else {**row_of(sample), **beside}
    return line_of(row) + "\n"
