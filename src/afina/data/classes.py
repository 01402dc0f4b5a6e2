"""Whether the answers of a data set are classes: few, short, and each given many times."""

from collections import Counter
from collections.abc import Sequence

from afina.data.conversation import Sample

LONGEST = 64
"""Characters of a class's name at most."""
EACH = 5
"""Times a class is given, on average, at least."""
MOST = 200
"""Classes at most."""


def classes_of(samples: Sequence[Sample]) -> Counter[str] | None:
    """How often each answer is given, the commonest first, where the answers are classes; else None."""
    counts: Counter[str] = Counter()
    for sample in samples:
        answer = sample.answer.strip()
        counts[answer] += 1
        if len(answer) > LONGEST or "\n" in answer or len(counts) > MOST:
            return None
    return counts if 1 < len(counts) <= len(samples) / EACH else None
