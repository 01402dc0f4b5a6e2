"""Small byte-level tokenizers that own the control tokens of a given chat template."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from afina.data.sandbox import without_clock
from afina.data.tokenizer import Tokenizer
from afina.recipe.place import BUNDLED

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is two plus two? It is four, and the answer is final.",
    "You are a helpful assistant. user assistant system model developer\n\nToday Date: 26 Jul 2024. Knowledge cutoff",
    "¿Cuántos niños hay en la clase? Hay doce niñas y diez niños, señor. Mañana será otro día.",
]

FAMILIES: dict[str, dict[str, object]] = {
    "HuggingFaceTB-SmolLM3-3B": dict(eos="<|im_end|>", special=["<|im_start|>"], tags=["<think>", "</think>"]),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": dict(
        bos="<|begin_of_text|>",
        eos="<|im_end|>",
        special=["<|im_start|>"],
        tags=["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"],
    ),
    "Qwen-Qwen2.5-7B-Instruct": dict(
        eos="<|im_end|>", special=["<|im_start|>", "<|endoftext|>"], tags=["<tool_call>", "</tool_call>"]
    ),
    "Qwen-Qwen3-0.6B": dict(
        eos="<|im_end|>",
        special=["<|im_start|>", "<|endoftext|>"],
        tags=["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    ),
    "google-gemma-2-2b-it": dict(bos="<bos>", eos="<eos>", special=["<start_of_turn>", "<end_of_turn>"], adds_bos=True),
    "ibm-granite-granite-4.0": dict(
        bos="<|end_of_text|>", eos="<|end_of_text|>", special=["<|start_of_role|>", "<|end_of_role|>"]
    ),
    "meta-llama-Llama-3.1-8B-Instruct": dict(
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        special=["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>"],
        adds_bos=True,
    ),
    "meta-llama-Llama-3.2-3B-Instruct": dict(
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        special=["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>"],
        adds_bos=True,
    ),
    "microsoft-Phi-3.5-mini-instruct": dict(
        bos="<s>", eos="<|endoftext|>", special=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], rstrip=True
    ),
    "mistralai-Mistral-Nemo-Instruct-2407": dict(
        bos="<s>",
        eos="</s>",
        special=["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"],
        adds_bos=True,
    ),
    "openai-gpt-oss-120b": dict(
        bos="<|startoftext|>",
        eos="<|return|>",
        special=["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>", "<|endoftext|>"],
    ),
    "afina/alpaca": dict(bos="<s>", eos="</s>", special=[], adds_bos=True),
    "afina/chatml": dict(eos="<|im_end|>", special=["<|im_start|>"]),
    "afina/plain": dict(bos="<s>", eos="</s>", special=[]),
    "afina/tiny": dict(bos="<|endoftext|>", eos="<|im_end|>", special=["<|im_start|>"]),
}
"""Per template: which tokens of its model are special, which are tags, and whether the tokenizer itself adds BOS."""


def tokenizer_for(name: str, published: Path | None) -> Tokenizer:
    """The tokenizer of a family with its template, its clock stopped as load_tokenizer stops it.

    `published` is the folder of the templates that are not ours.
    """
    if name == "afina/tiny":
        file = BUNDLED / "tiny" / "chat_template.jinja"
    elif published is None:
        file = BUNDLED / "templates" / f"{name.removeprefix('afina/')}.jinja"
    else:
        file = published / f"{name}.jinja"
    return Tokenizer(small(name), without_clock(file.read_text("utf-8")))


@cache
def small(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    return build(**family)


def build(
    *,
    eos: str = "</s>",
    bos: str | None = None,
    special: list[str] | tuple[str, ...] = (),
    tags: list[str] | tuple[str, ...] = (),
    words: list[str] | tuple[str, ...] = (),
    adds_bos: bool = False,
    rstrip: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens."""
    core = Backend(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    names = dict.fromkeys([*([bos] if bos else []), eos, "<|pad|>", *special])
    core.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=rstrip) for text in names])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    core.add_tokens([AddedToken(text, special=False) for text in words])
    if adds_bos and bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
