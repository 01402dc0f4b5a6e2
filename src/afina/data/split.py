"""Which samples are kept back for validation: decided by seed and content, never by the order of rows."""

from afina.data.conversation import Sample
from afina.errors import DataError
from afina.language import _


def split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, validation), each in the order given; equal samples stay on one side.

    The samples with the smallest keyed hashes are kept back, at least one where `share` > 0. Raises DataError when
    nothing would be left to learn from.
    """
    if share == 0:
        return samples, []
    hashes = [sample.digest(salt=f"split {seed}") for sample in samples]
    wanted = max(1, round(share * len(samples)))
    cut = sorted(hashes)[min(wanted, len(hashes)) - 1]
    kept_back = [sample for sample, key in zip(samples, hashes, strict=True) if key <= cut]
    train = [sample for sample, key in zip(samples, hashes, strict=True) if key > cut]
    if not train:
        raise DataError(
            _("{count} samples are too few to keep {share:.0%} back for validation.").format(
                count=len(samples), share=share
            ),
            hint=_("Add samples, or set data.validation to 0."),
        )
    return train, kept_back
