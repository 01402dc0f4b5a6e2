"""What the tokenizer and the chat template make of the rows: is an answer learnt, with its end, whole, and once begun?

Renders every conversation as training will; the same function judges there (data/template.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from afina.data.audit.letters import Fault
from afina.data.conversation import PASSAGE, Sample
from afina.data.problem import BadRows
from afina.data.template import Rendered, Renderer, faults
from afina.data.tokenizer import Refusal, Tokenizer
from afina.errors import DataError


@dataclass
class Labels:
    """Judges the labels of samples. Counts what is learnt as it goes."""

    renderer: Renderer
    max_length: int
    tokens: int = 0
    learnt: int = 0
    longest: int = 0

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[int, Fault]]:
        """Place and fault of every sample whose labels are wrong, or whose text holds a control token of this model."""
        controls = self.renderer.control_pattern
        for at, sample in enumerate(samples):
            for message in sample.messages:
                if found := controls.search(message.content):
                    yield at, Fault("control-token", 0, 0, found.group())
                    break
        for at, rendered in enumerate(self._rendered(samples)):
            if isinstance(rendered, Fault):
                yield at, rendered
                continue
            ends = samples[at].messages[0].role != PASSAGE
            for kind, detail in faults(rendered, self.renderer.tokenizer, self.max_length, ends=ends):
                yield at, Fault(kind, 0, 0, detail)
            if (unknown := self._unknown(rendered)) is not None:
                yield at, unknown
            self.tokens += rendered.ids.size
            self.learnt += int(rendered.learnt.sum())
            self.longest = max(self.longest, rendered.ids.size)

    def _rendered(self, samples: Sequence[Sample]) -> list[Rendered | Fault]:
        """All at once, which uses all cores; one by one where some are refused."""
        try:
            return list(self.renderer.samples(samples)) if samples else []
        except BadRows:
            return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Rendered | Fault:
        try:
            return self.renderer.sample(sample)
        except BadRows as error:
            return Fault("template-refuses", 0, 0, error.problems[0].reason)
        except (DataError, Refusal) as error:
            return Fault("template-refuses", 0, 0, error.message)

    def _unknown(self, rendered: Rendered) -> Fault | None:
        unknown = self.renderer.tokenizer.hf.unk_token_id
        if unknown is None or unknown in self.renderer.tokenizer.end_ids:
            return None
        count = int(np.count_nonzero(rendered.ids == unknown))
        return Fault("unknown-characters", 0, 0, str(count)) if count else None


def of_tokenizer(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Class and detail of what is odd about a tokenizer, whatever it is given."""
    pad = tokenizer.hf.pad_token_id
    if pad is not None and pad in tokenizer.end_ids:
        return [("pad-is-end", str(tokenizer.hf.pad_token))]
    return []
