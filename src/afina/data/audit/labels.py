"""What the tokenizer and the chat template make of the rows: is an answer learnt, with its end, whole, and once begun?

Renders every conversation as training will, which asks the same function before its first step (`audit`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from afina.data.audit.kinds import kinds
from afina.data.audit.letters import Fault
from afina.data.conversation import PASSAGE, Sample
from afina.data.problem import BadRows
from afina.data.template import Rendered, Renderer
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
        parts = [(at, part) for at, sample in enumerate(samples) for part in self.renderer.apart([sample])]
        told: set[tuple[int, str]] = set()
        for (at, part), rendered in zip(parts, self._rendered([part for _at, part in parts]), strict=True):
            for fault in self._faults(part, rendered):
                if (at, fault.kind) not in told:
                    told.add((at, fault.kind))
                    yield at, fault

    def _faults(self, sample: Sample, rendered: Rendered | Fault) -> Iterator[Fault]:
        if isinstance(rendered, Fault):
            yield rendered
            return
        ends = sample.messages[0].role != PASSAGE
        for kind, detail in faults(rendered, self.renderer.tokenizer, self.max_length, ends=ends):
            yield Fault(kind, 0, 0, detail)
        if (unknown := self._unknown(rendered)) is not None:
            yield unknown
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


def audit(
    samples: Sequence[Sample], rendered: Sequence[Rendered], tokenizer: Tokenizer, max_length: int
) -> list[tuple[Sample, str]]:
    """What is wrong with the labels, sample by sample, before the first step; empty when all is well.

    Checked: something is learnt; the end of turn is learnt; the sequence fits, so no answer is cut off; one BOS.
    """
    problems: list[tuple[Sample, str]] = []
    for sample, row in zip(samples, rendered, strict=True):
        ends = sample.messages[0].role != PASSAGE
        for kind, detail in faults(row, tokenizer, max_length, ends=ends):
            sentence = kinds()[kind].sentence
            problems.append((sample, f"{sentence}: {detail}" if detail else sentence))
    return problems


def faults(row: Rendered, tokenizer: Tokenizer, max_length: int, *, ends: bool = True) -> Iterator[tuple[str, str]]:
    """Class (audit/kinds.py) and detail of what is wrong with the labels of a sample. ends: it has an end to learn."""
    learnt = np.flatnonzero(row.learnt[1:]) + 1  # the first token is never predicted
    bos = tokenizer.hf.bos_token_id
    if learnt.size == 0:
        yield "nothing-learnt", ""
    elif ends and int(row.ids[learnt[-1]]) not in tokenizer.end_ids:
        yield "end-not-learnt", ""
    if row.ids.size > max_length:
        yield "over-context", f"{row.ids.size} > {max_length}"
    if bos is not None and row.ids[:2].tolist() == [bos, bos]:
        yield "double-bos", ""
