"""Writing that can only become JSON, or one of some texts. The one door to llguidance, an optional package.

The end of turn is allowed where the text is complete, and nowhere else. White space in JSON is fixed, because a weak
model would write blanks for ever. llguidance bounds by itself what a schema may cost, and fetches none.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from afina.errors import ModelError, ResourceError
from afina.language import _
from afina.model.rows import Grammar


class Vocabulary:
    """A tokenizer of transformers as llguidance knows it, made once. Raises ResourceError where that is missing."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ResourceError(
                _("Constrained decoding needs the package llguidance, which is not installed."),
                hint=_('Run: pip install "afina[eval]"'),
            ) from error
        self._matcher, self._end_ids = llguidance.LLMatcher, tuple(end_ids)
        self._known = llguidance.hf.from_tokenizer(tokenizer, eos_token=end_ids[0] if end_ids else None)

    def choices(self, texts: Sequence[str]) -> Callable[[], Grammar]:
        """A maker of grammars, one for each answer, that must be one of `texts`."""
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._maker(self._matcher.grammar_from_lark(f"start: {options}"))

    def json(self, schema: str) -> Callable[[], Grammar]:
        """The same for JSON of a JSON Schema; {} means any object. Raises ModelError for one that is none, or that is
        beyond llguidance."""
        spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            wanted = json.loads(schema)
            text = self._matcher.grammar_from_json_schema(json.dumps(wanted or {"type": "object"}), defaults=spaces)
        except (ValueError, RecursionError) as error:
            raise _beyond(str(error)) from error
        return self._maker(text)

    def _maker(self, text: str) -> Callable[[], Grammar]:
        first = self._matcher(self._known, text)
        if first.is_error():
            raise _beyond(first.get_error())
        return lambda: _Guided(first.deep_copy(), self._known.vocab_size, self._end_ids)


class _Guided:
    """llguidance's matcher as a `Grammar`."""

    def __init__(self, matcher: Any, width: int, end_ids: tuple[int, ...]) -> None:
        self._matcher, self._width, self._end_ids = matcher, width, list(end_ids)

    def allowed(self) -> torch.Tensor:
        """See `Grammar`. Raises ModelError where the schema became too much for llguidance."""
        if self._matcher.is_stopped():
            mask = torch.zeros(self._width, dtype=torch.bool)
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._width].astype(bool))
        if self._matcher.is_error():
            raise _beyond(self._matcher.get_error())
        if self._matcher.is_accepting() or self._matcher.is_stopped():
            mask[self._end_ids] = True
        return mask

    def take(self, index: int) -> None:
        """See `Grammar`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(index)


def _beyond(reason: str) -> ModelError:
    return ModelError(
        _("Nothing can be written to this JSON Schema: {reason}").format(reason=reason.strip().split("\n")[0][:200]),
        hint=_("Write it with what llguidance knows: types, properties, required, items, enum, anyOf, $ref inside it."),
    )
