"""Writing that can only become JSON, or one of some texts. The one door to llguidance, an optional package.

The end of turn is allowed where the text is complete, and nowhere else. White space in JSON is fixed, because a weak
model would write blanks for ever.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from afina.data.tokenizer import Tokenizer
from afina.errors import ResourceError
from afina.evaluate.systems.asking import Constraint
from afina.language import _
from afina.model.rows import Grammar


def grammars(tokenizer: Tokenizer, constraint: Constraint) -> Callable[[], Grammar]:
    """A maker of grammars, one for each answer. Raises ResourceError where llguidance is missing."""
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise ResourceError(
            _("Constrained decoding needs the package llguidance, which is not installed."),
            hint=_('Run: pip install "afina[eval]"'),
        ) from error
    end = tokenizer.end_ids[0] if tokenizer.end_ids else None
    known = llguidance.hf.from_tokenizer(tokenizer.hf, eos_token=end)
    if constraint.choices:
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in constraint.choices)
        text = llguidance.LLMatcher.grammar_from_lark(f"start: {options}")
    else:
        schema = constraint.schema or "{}"
        wanted = {"type": "object"} if json.loads(schema) == {} else json.loads(schema)
        text = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(wanted), defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
    return lambda: _Guided(llguidance.LLMatcher(known, text), known.vocab_size, tokenizer.end_ids)


class _Guided:
    """llguidance's matcher as a `Grammar`."""

    def __init__(self, matcher: Any, width: int, end_ids: tuple[int, ...]) -> None:
        self._matcher, self._width, self._end_ids = matcher, width, list(end_ids)

    def allowed(self) -> torch.Tensor:
        """See `Grammar`."""
        if self._matcher.is_stopped():
            mask = torch.zeros(self._width, dtype=torch.bool)
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._width].astype(bool))
        if self._matcher.is_accepting() or self._matcher.is_stopped():
            mask[self._end_ids] = True
        return mask

    def take(self, index: int) -> None:
        """See `Grammar`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(index)
