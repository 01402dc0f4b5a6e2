"""Which samples are kept back for validation: decided by seed and content, never by the order of rows."""

from collections import Counter

from afina.data.conversation import Sample
from afina.errors import DataError
from afina.language import _


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, validation), each in the order given; equal samples stay on one side.

    The samples with the smallest keyed hashes are kept back, at least one where `share` > 0. A sample that occurs more
    often than there is room left is passed over. Raises DataError when nothing would be left to learn from.
    """
    if share == 0 or not samples:
        return samples, []
    hashes = [sample.digest(salt=f"split {seed}") for sample in samples]
    chosen = _smallest(Counter(hashes), max(1, round(share * len(samples))))
    kept_back = [sample for sample, key in zip(samples, hashes, strict=True) if key in chosen]
    train = [sample for sample, key in zip(samples, hashes, strict=True) if key not in chosen]
    if not train:
        raise DataError(
            _("{count} different samples are too few to keep {share:.0%} back for validation.").format(
                count=len(set(hashes)), share=share
            ),
            hint=_("Add samples, or set data.validation to 0."),
        )
    return train, kept_back


def _smallest(counts: Counter[bytes], wanted: int) -> set[bytes]:
    """The smallest hashes that together stand for at most `wanted` samples; the rarest one where none is that rare."""
    chosen: set[bytes] = set()
    for key in sorted(counts):
        if counts[key] <= wanted:
            chosen.add(key)
            wanted -= counts[key]
    return chosen or {min(counts, key=lambda key: (counts[key], key))}
