"""What a GGUF file says before its weights: figures, positions, tokenizer, and tables that follow from these.

A door to the `gguf` package's writer. Knows nothing of weights.
"""

import re
from typing import Any

import gguf
import numpy as np

from afina.export.families import Shape
from afina.export.gguf_vocab import Vocabulary
from afina.export.mixes import FORMATS, PLAIN

QUANTIZATION_VERSION = 2


def position_tables(shape: Shape) -> dict[str, np.ndarray]:
    """Tensors that follow from the configuration: what each rotation frequency is divided by."""
    if shape.rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_frequencies(shape)}
    if shape.rope["rope_type"] == "longrope":
        kinds = ("long", "short")
        return {f"rope_factors_{kind}.weight": np.array(shape.rope[f"{kind}_factor"], np.float32) for kind in kinds}
    return {}


def _llama3_frequencies(shape: Shape) -> np.ndarray:
    """What each rotation frequency is divided by: 1 for short waves, `factor` for long ones, between them a ramp in
    the number of turns within the original context (Llama 3.1's long-context scaling)."""
    rope = shape.rope
    waves = 2 * np.pi * shape.theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = rope["original"] / waves
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray = (1 / ((1 - ramp) / factor + ramp)).astype(np.float32)
    return divisors


def add_metadata(writer: Any, shape: Shape, vocabulary: Vocabulary, kind: str, title: str) -> None:
    """Everything that `writer` is to say of the model, of a file in the format `kind` that is called `title`."""
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[FORMATS[kind][1]])
    if kind not in PLAIN:
        writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    if shape.family.epsilon == "layer_norm_eps":
        writer.add_layer_norm_eps(shape.epsilon)
    else:
        writer.add_layer_norm_rms_eps(shape.epsilon)
    if shape.window is not None:
        writer.add_sliding_window(shape.window)
    if shape.experts[0]:
        writer.add_expert_count(shape.experts[0])
        writer.add_expert_used_count(shape.experts[1])
        writer.add_expert_feed_forward_length(shape.intermediate)
    attention, logits = shape.softcaps
    if attention is not None:
        writer.add_attn_logit_softcapping(float(attention))
    if logits is not None:
        writer.add_final_logit_softcapping(float(logits))
    writer.add_vocab_size(len(vocabulary.tokens))
    _add_rope(writer, shape)
    _add_vocabulary(writer, vocabulary)


def _add_rope(writer: Any, shape: Shape) -> None:
    rope = shape.rope
    writer.add_rope_dimension_count(shape.rotated)
    writer.add_rope_freq_base(shape.theta)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original"])
        writer.add_rope_scaling_attn_factors(rope["attention"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    for add, index in (
        (writer.add_bos_token_id, vocabulary.bos),
        (writer.add_eos_token_id, vocabulary.eos),
        (writer.add_unk_token_id, vocabulary.unk),
        (writer.add_pad_token_id, vocabulary.pad),
        (writer.add_eot_token_id, vocabulary.eot),
        (writer.add_eom_token_id, vocabulary.eom),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def safe_name(name: str) -> str:
    """llama.cpp treats the tokens of any model whose name has "phi-3" in it in another way, or fails to load it."""
    return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)
