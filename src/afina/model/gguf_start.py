"""A GGUF file as where fine-tuning starts: its figures and its tensors as transformers names and lays them out.

What llama.cpp keeps in another way is undone: rows of query and key projections woven into pairs, Gemma's norms counted
from 1, gate and up of gpt-oss apart. Quantised tensors become the numbers that they stand for; experts in MXFP4 stay
packed where wanted. What a file does not say follows from its family.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from afina.errors import ModelError
from afina.gguf_file import GgufFile
from afina.language import _
from afina.model.mxfp4 import quantise

KINDS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi2": "phi",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gpt-oss": "gpt_oss",
}
"""llama.cpp's architecture to transformers' model_type. Mistral and SmolLM are llama."""
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_WHOLE = {
    "phi2": {
        "output_norm.weight": "model.final_layernorm.weight",
        "output_norm.bias": "model.final_layernorm.bias",
    }
}
OTHER_LAYER = {
    "phi2": {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "gpt-oss": {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
}
"""Where an architecture has another name than `WHOLE` and `LAYER`."""
FOLLOWS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd")
"""Tensors that belong to the figures."""
CHUNK = 2**24
"""Values of a tensor that are decoded at once."""
GEMMA2_27B_LAYERS = 46
"""Gemma 2 27B divides its queries by another root than its size of head; llama.cpp too knows it by its layers."""


def kind_of(file: GgufFile) -> str:
    """transformers' model_type. Raises ModelError for an architecture that is not read."""
    kind = KINDS.get(file.architecture)
    if kind is None:
        raise ModelError(
            _("GGUF files of the architecture {name} are not read.").format(name=file.architecture),
            hint=_("These are: {names}. Or start from the model's folder in transformers' format.").format(
                names=", ".join(KINDS)
            ),
            file=file.path,
        )
    return kind


def figures(file: GgufFile) -> dict[str, Any]:
    """What transformers' configuration of `kind_of(file)` takes. Raises ModelError for a file that does not say it."""
    name = file.architecture

    def said(key: str, kind: type, default: Any = ...) -> Any:
        return file.value(f"{name}.{key}", kind, default)

    heads, hidden = said("attention.head_count", int), said("embedding_length", int)
    if not 0 < heads <= hidden:
        raise ModelError(_("The GGUF file has impossible figures: {heads} heads.").format(heads=heads), file=file.path)
    head = said("attention.key_length", int, hidden // heads)
    found: dict[str, Any] = {
        "architectures": None,
        "vocab_size": _rows_of(file, "token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": said("feed_forward_length", int),
        "num_hidden_layers": said("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": said("attention.head_count_kv", int, heads),
        "max_position_embeddings": said("context_length", int),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, head, said),
        **{
            f"{token}_token_id": file.value(f"tokenizer.ggml.{key}_token_id", int, None)
            for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    if name == "phi2":
        found["layer_norm_eps"] = said("attention.layer_norm_epsilon", float)
    else:
        found["rms_norm_eps"] = said("attention.layer_norm_rms_epsilon", float)
    if name in ("phi2", "phi3"):
        found["rope_parameters"]["partial_rotary_factor"] = said("rope.dimension_count", int, head) / head
    else:
        found["head_dim"] = head
    found |= _of_the_family(file, name, head, hidden // heads, said)
    return {key: value for key, value in found.items() if value is not None}


def _of_the_family(file: GgufFile, name: str, head: int, usual_head: int, said: Callable[..., Any]) -> dict[str, Any]:
    """Figures that one family alone has."""
    if name == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        }
    if name == "phi3":
        return {
            "sliding_window": said("attention.sliding_window", int, None),
            "original_max_position_embeddings": said("rope.scaling.original_context_length", int, None),
        }
    if name == "gemma2":
        big = said("block_count", int) == GEMMA2_27B_LAYERS
        return {
            "sliding_window": said("attention.sliding_window", int, 4096),
            "attn_logit_softcapping": said("attn_logit_softcapping", float, 50.0),
            "final_logit_softcapping": said("final_logit_softcapping", float, 30.0),
            "query_pre_attn_scalar": usual_head if big else head,
        }
    if name == "gpt-oss":
        return {
            "intermediate_size": said("expert_feed_forward_length", int, said("feed_forward_length", int)),
            "num_local_experts": said("expert_count", int),
            "num_experts_per_tok": said("expert_used_count", int),
            "sliding_window": said("attention.sliding_window", int, 128),
        }
    return {}


def _rope(file: GgufFile, head: int, said: Callable[..., Any]) -> dict[str, Any]:
    """How positions turn."""
    theta, context = said("rope.freq_base", float, 10000.0), said("context_length", int)
    factor = said("rope.scaling.factor", float, None)
    original = said("rope.scaling.original_context_length", int, None)
    kind = said("rope.scaling.type", str, None)
    if "rope_factors_long.weight" in file.tensors:
        turned = said("rope.dimension_count", int, head) // 2
        long, short = (file.values(f"rope_factors_{part}.weight") for part in ("long", "short"))
        if len(long) != turned or len(short) != turned:
            raise ModelError(_("The GGUF file scales positions by tables of another length."), file=file.path)
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "factor": context / (original or context),
            "original_max_position_embeddings": original,
            "attention_factor": said("rope.scaling.attn_factor", float, None),
        }
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, **_fitted(file, theta, head)}
    if kind == "yarn" and factor:
        beside = {"truncate": False} if file.architecture == "gpt-oss" else {}
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": said("rope.scaling.yarn_beta_fast", float, 32.0),
            "beta_slow": said("rope.scaling.yarn_beta_slow", float, 1.0),
            **beside,
        }
    if kind == "linear" and factor:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _fitted(file: GgufFile, theta: float, head: int) -> dict[str, Any]:
    """Llama 3's scaling, found from the table of divisors that it makes: the file says no more than the table.

    The original context is a power of two and the ramp runs from 1 to 4 turns in every Llama there is.
    """
    table = file.values("rope_freqs.weight").astype(np.float64)
    factor = float(table.max()) if len(table) == head // 2 else 0.0
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    for power in range(4, 21):
        ramp = np.clip((2.0**power / waves - 1) / 3, 0, 1)
        if factor > 1 and np.allclose(1 / ((1 - ramp) / factor + ramp), table, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2**power,
            }
    raise ModelError(
        _("The GGUF file scales positions by a table that is not Llama 3's."),
        hint=_("Start from the model's folder in transformers' format."),
        file=file.path,
    )


def read_tensors(file: GgufFile, dtype: torch.dtype, *, packed: bool) -> dict[str, torch.Tensor]:
    """Every tensor by the name transformers gives it, in `dtype`, laid out as transformers has it.

    `packed`: experts in MXFP4 as blocks and scales. Raises ModelError for a tensor that belongs nowhere.
    """
    name = file.architecture
    whole, layer = WHOLE | OTHER_WHOLE.get(name, {}), LAYER | OTHER_LAYER.get(name, {})
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, str]] = {}
    for stored in file.tensors:
        if FOLLOWS.fullmatch(stored):
            continue
        block = re.fullmatch(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)", stored)
        target = whole.get(stored)
        if block and (part := re.fullmatch(r"ffn_(gate|up|down)_exps", block[2])):
            experts.setdefault(block[1], {})[f"{part[1]}.{block[3]}"] = stored
            continue
        if block and block[2] in layer:
            target = f"model.layers.{block[1]}.{layer[block[2]]}.{block[3]}"
        if target is None:
            raise ModelError(
                _("The GGUF file has a tensor that is not known: {name}.").format(name=stored), file=file.path
            )
        value = _read(file, stored, dtype)
        found |= dict(_as_transformers(file, name, target.replace(".sinks.weight", ".sinks"), value))
    for number, parts in experts.items():
        prefix = f"model.layers.{number}.mlp.experts."
        found |= {prefix + key: value for key, value in _experts(file, parts, dtype, packed)}
    return found


def _as_transformers(file: GgufFile, name: str, target: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as transformers has it; phi2's fused projection is three there."""
    if name == "llama" and (part := re.search(r"\.(q|k)_proj\.", target)):
        key = "attention.head_count" if part[1] == "q" else "attention.head_count_kv"
        heads = file.value(f"llama.{key}", int, file.value("llama.attention.head_count", int))
        if not heads or value.shape[0] % (2 * heads):
            raise ModelError(
                _("The GGUF file has impossible figures: {heads} heads.").format(heads=heads), file=file.path
            )
        value = woven_apart(value, heads)
    if name == "gemma2" and "norm" in target:
        value = value - 1
    if name == "phi2" and ".qkv_proj." in target:
        for letter, rows in zip("qkv", value.chunk(3), strict=True):
            yield target.replace("qkv_proj", f"{letter}_proj"), rows.clone()
        return
    yield target, value


def woven_apart(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * d, ...) of heads woven into pairs (0, d/2), (1, d/2 + 1), ..., back to 0, 1, 2, ..."""
    pairs = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape).contiguous()


def _experts(
    file: GgufFile, parts: dict[str, str], dtype: torch.dtype, packed: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """gate and up woven into one matrix, as transformers has it: even columns are gate's, odd ones up's."""
    missing = {f"{name}.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")} - parts.keys()
    if missing:
        raise ModelError(_("The file lacks the tensor {name}.").format(name=f"ffn_{min(missing)}"), file=file.path)
    gate_up_bias = [_read(file, parts[f"{name}.bias"], dtype) for name in ("gate", "up")]
    yield "gate_up_proj_bias", torch.stack(gate_up_bias, dim=-1).flatten(1)
    yield "down_proj_bias", _read(file, parts["down.bias"], dtype)
    for name, sources in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        stored = [parts[f"{source}.weight"] for source in sources]
        if packed and all(file.tensors[one].kind == "mxfp4" for one in stored):
            halves = [_packed(file, one) for one in stored]
            for kind, tensors in zip(("blocks", "scales"), zip(*halves, strict=True), strict=True):
                yield f"{name}_{kind}", torch.stack(tensors, dim=2).flatten(1, 2) if len(tensors) > 1 else tensors[0]
        else:
            rows = [_read(file, one, dtype) for one in stored]
            yield name, torch.stack(rows, dim=2).flatten(1, 2).transpose(1, 2).contiguous()


def _packed(file: GgufFile, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of all experts as transformers packs it: exact, for its numbers are on MXFP4's grid already."""
    found = [quantise(torch.from_numpy(file.values(name, at, at + 1))) for at in range(file.tensors[name].shape[0])]
    blocks, scales = zip(*found, strict=True)
    return torch.cat(blocks), torch.cat(scales)


def is_packed(file: GgufFile) -> bool:
    """Whether every matrix of experts is in MXFP4."""
    kinds = [tensor.kind for name, tensor in file.tensors.items() if re.search(r"_exps\.weight$", name)]
    return bool(kinds) and set(kinds) == {"mxfp4"}


def _read(file: GgufFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in `dtype`, decoded some rows at a time."""
    shape = file.tensors[name].shape
    found = torch.empty(shape, dtype=dtype)
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        found[start : start + step] = torch.from_numpy(np.ascontiguousarray(file.values(name, start, start + step)))
    return found


def _rows_of(file: GgufFile, name: str) -> int:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelError(_("The file lacks the tensor {name}.").format(name=name), file=file.path)
    return tensor.shape[0]
