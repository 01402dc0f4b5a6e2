"""A translation model on this machine: Marian, M2M, NLLB, T5 and other sequence-to-sequence models of transformers."""

from collections.abc import Sequence
from typing import Any

import torch

from afina.errors import AfinaError, ModelError, ResourceError
from afina.language import _
from afina.model.load import Hardware

TOKENS = 512
"""Of one paragraph, read or written, at most; one that is longer is not translated, rather than cut."""
LONG = {"en": "eng", "es": "spa", "fr": "fra", "de": "deu", "pt": "por", "it": "ita"}
"""Languages as Marian's and NLLB's models of many write them."""


class Translator:
    """A model and its tokenizer. `source` and `target` are told to models of many languages (M2M, NLLB, mBART).

    Raises ModelError for a folder that is none, or a language that such a model does not know.
    """

    def __init__(self, name: str, hardware: Hardware, source: str, target: str) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=hardware.dtype
            )
        except ImportError as error:
            raise ResourceError(
                _("A package is needed for the tokenizer of {name}.").format(name=name),
                hint=_('Run: pip install "afina[translate]"'),
            ) from error
        except AfinaError:  # a signal
            raise
        except Exception as error:  # a damaged folder makes transformers raise anything at all
            raise ModelError(
                _("{name} cannot be loaded as a translation model: {reason}").format(
                    name=name, reason=str(error).strip().split("\n")[0] or type(error).__name__
                ),
                hint=_("Name a folder or a hub model such as Marian's, with safetensors; or use --endpoint."),
            ) from error
        self._model = model.to(hardware.device).eval()
        self._most = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
        self._forced: int | None = None
        self._before = ""
        self._tell(name, source, target)

    def _tell(self, name: str, source: str, target: str) -> None:
        """Tell a model of many languages which two are meant."""
        known = {*self._tokenizer.get_added_vocab(), *self._tokenizer.get_vocab()}
        targets = [text for text in known if text.startswith(">>") and text.endswith("<<")]
        if targets:  # Marian's, of many targets: the text begins with one
            self._before = _among(known, name, target, f">>{target}<<", f">>{LONG.get(target)}<<") + " "
        elif any(_spellings(code) & known for code in LONG):
            begin = _among(known, name, source, *_spellings(source))
            self._tokenizer.src_lang = begin.strip("_") if begin.startswith("__") else begin
            self._forced = int(self._tokenizer.convert_tokens_to_ids(_among(known, name, target, *_spellings(target))))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """Each text translated, greedily, so that the same text is always the same; None of one that is too long."""
        inputs = self._tokenizer([self._before + text for text in texts], return_tensors="pt", padding=True)
        lengths = inputs["attention_mask"].sum(1)
        fits = lengths <= self._most
        if not fits.any():
            return [None] * len(texts)
        some = {name: value[fits, : int(lengths[fits].max())].to(self._model.device) for name, value in inputs.items()}
        more = {} if self._forced is None else {"forced_bos_token_id": self._forced}
        output = self._model.generate(**some, max_new_tokens=self._most - 1, num_beams=1, do_sample=False, **more)
        ended = (output[:, 1:] == self._model.generation_config.eos_token_id).any(1).tolist()
        found = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        made = iter([str(text) if end else None for text, end in zip(found, ended, strict=True)])
        return [next(made) if fit else None for fit in fits.tolist()]


def _spellings(code: str) -> set[str]:
    """How models of many languages write one: NLLB, M2M, mBART; or as it was given."""
    return {code, f"__{code}__", f"{code}_XX", f"{LONG.get(code)}_Latn"}


def _among(known: set[str], name: str, code: str, *spellings: str) -> str:
    found = sorted(text for text in spellings if text in known)
    if not found:
        raise ModelError(
            _("{name} does not know the language {code}.").format(name=name, code=code),
            hint=_("Write it as this model does, with --to and --from: such as spa_Latn for NLLB, es for M2M."),
        )
    return max(found, key=len)
