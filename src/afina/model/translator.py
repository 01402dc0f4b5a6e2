"""A translation model on this machine: Marian, M2M, NLLB, T5 and other sequence-to-sequence models of transformers."""

from collections.abc import Sequence
from typing import Any

import torch

from afina.errors import ModelError
from afina.language import _
from afina.model.load import Hardware

TOKENS = 512
"""Of one paragraph's translation; longer ones are cut by the model, and the proof then keeps the row back."""


class Translator:
    """A model and its tokenizer. `source` and `target` are told to models of many languages (M2M, NLLB)."""

    def __init__(self, name: str, hardware: Hardware, source: str, target: str) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=hardware.dtype
            )
        except Exception as error:  # a damaged folder makes transformers raise anything at all
            raise ModelError(
                _("{name} cannot be loaded as a translation model: {reason}").format(
                    name=name, reason=str(error).strip().split("\n")[0] or type(error).__name__
                ),
                hint=_("Name a folder or a hub model such as Marian's, with safetensors; or use --endpoint."),
            ) from error
        self._model = model.to(hardware.device).eval()
        self._forced = None
        codes = getattr(self._tokenizer, "lang_code_to_id", None) or self._tokenizer.get_added_vocab()
        for code in (target, f"__{target}__"):
            if code in codes:
                self._forced = self._tokenizer.convert_tokens_to_ids(code)
                self._tokenizer.src_lang = source

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Each text translated, greedily, so that the same text is always the same."""
        inputs = self._tokenizer(list(texts), return_tensors="pt", padding=True).to(self._model.device)
        more = {} if self._forced is None else {"forced_bos_token_id": self._forced}
        output = self._model.generate(**inputs, max_new_tokens=TOKENS, num_beams=1, do_sample=False, **more)
        return [str(text) for text in self._tokenizer.batch_decode(output, skip_special_tokens=True)]
