"""A transformers model folder as one GGUF file, the format of llama.cpp, Ollama and LM Studio.

The one door to the `gguf` package, which writes the container and knows the names of tensors. Here stand the facts it
does not know: which tensors each architecture has (`FAMILIES`), in what order llama.cpp wants the rows of the query and
key projections, and how each tensor is stored. One tensor at a time is in memory. The tokenizer is gguf_vocab.py's.
"""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from afina import durable
from afina.errors import ModelError
from afina.export.gguf_vocab import Vocabulary, read_json, read_vocabulary
from afina.language import _

Kind = Literal["f32", "f16", "q8_0"]
F32: int = gguf.GGMLQuantizationType.F32
F16: int = gguf.GGMLQuantizationType.F16
Q8_0: int = gguf.GGMLQuantizationType.Q8_0
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
QUANTIZATION_VERSION = 2
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The number types of a source tensor, as safetensors names them."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."
QUERY, KEY = "self_attn.q_proj", "self_attn.k_proj"
PROJECTIONS = (
    QUERY,
    KEY,
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
BLOCK = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"{name}.weight" for name in PROJECTIONS),
)
BIASES = tuple(f"{name}.bias" for name in PROJECTIONS)
DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry although they follow from the configuration."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp's graph of an architecture reads.

    `architecture` is llama.cpp's name. Every layer has the tensors of `block` and may have those of `optional`.
    `interleaved` projections have their rows, per head, as pairs (0, d/2), (1, d/2 + 1), ...: llama.cpp rotates
    neighbours there, transformers rotates halves. `ropes` are the scalings of positions that the graph honours.
    """

    architecture: str
    block: tuple[str, ...] = BLOCK
    optional: tuple[str, ...] = ()
    interleaved: tuple[str, ...] = ()
    ropes: frozenset[str] = frozenset({"default", "linear", "yarn"})


LLAMA = Family(
    "llama", optional=BIASES, interleaved=(QUERY, KEY), ropes=frozenset({"default", "linear", "yarn", "llama3"})
)
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", block=(*BLOCK, *BIASES[:3])),
    "Qwen3ForCausalLM": Family("qwen3", block=(*BLOCK, "self_attn.q_norm.weight", "self_attn.k_norm.weight")),
}


@dataclass(frozen=True)
class Shape:
    """The figures of a model: its config.json, checked. `rope` holds `rope_type` and what belongs to that type."""

    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    epsilon: float
    theta: float
    rope: dict[str, Any]
    tied: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """One tensor of the file: its name there, its name in the source, its shape, how it is stored.

    `heads` is how many heads the rows of an interleaved projection belong to, else 0.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    storage: int
    heads: int

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensor."""
        block, size = gguf.GGML_QUANT_SIZES[self.storage]
        return math.prod(self.shape) // int(block) * int(size)


def check_exportable(model_folder: Path) -> None:
    """Raise ModelError when this model could not be exported to GGUF. Reads no weights: call it before training."""
    _read_shape(model_folder)
    read_vocabulary(model_folder)


def write_gguf(model_folder: Path, out: Path, kind: Kind, *, name: str | None = None) -> dict[str, Any]:
    """Write the model in `model_folder` (as save_pretrained leaves it) to the GGUF file `out`.

    "f32" keeps every weight exactly; "f16" keeps vectors in F32; "q8_0" quantises each matrix whose rows divide by 32
    and keeps the others in F16. Returns the facts: `bytes`, `tensors`, `architecture`, `kind`, `name`, `parameters`,
    `tokenizer`, `not_quantised` (names) and `notes` (sentences on what llama.cpp does otherwise). Raises ModelError
    when llama.cpp could not run the model as it was trained, OutputError when `out` exists or cannot be written.
    """
    shape = _read_shape(model_folder)
    vocabulary = read_vocabulary(model_folder)
    title = _safe_name(name or model_folder.resolve().name)
    with ExitStack() as stack:
        source = stack.enter_context(closing(Source(model_folder)))
        rows = source.shape(EMBEDDING)[0]
        if rows < len(vocabulary.tokens):
            raise ModelError(
                _("The tokenizer has {tokens} tokens but the model only {rows} embeddings.").format(
                    tokens=len(vocabulary.tokens), rows=rows
                ),
                file=model_folder,
            )
        vocabulary.pad_to(rows)
        plans = _plan_tensors(shape, source, kind, model_folder)
        temporary = stack.enter_context(durable.new_file(out))
        writer = stack.enter_context(closing(gguf.GGUFWriter(temporary, shape.family.architecture)))
        _add_metadata(writer, shape, vocabulary, kind, title)
        _write_tensors(writer, shape, plans, source)
    return {
        "bytes": out.stat().st_size,
        "tensors": len(plans) + (shape.rope["rope_type"] == "llama3"),
        "architecture": shape.family.architecture,
        "kind": kind,
        "name": title,
        "parameters": sum(math.prod(plan.shape) for plan in plans),
        "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre},
        "not_quantised": [
            plan.name for plan in plans if kind == "q8_0" and len(plan.shape) > 1 and plan.storage != Q8_0
        ],
        "notes": [*shape.notes, *vocabulary.notes],
    }


class Source:
    """The tensors of a model folder by name, from one or several safetensors files, read when asked for."""

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in _weight_files(model_folder):
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(_("The weights cannot be read: {reason}.").format(reason=error), file=path) from error
            self._files |= dict.fromkeys(file.keys(), file)

    def names(self) -> set[str]:
        """The tensors there are."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. Raises ModelError when it is missing or not of floats."""
        file = self._files.get(name)
        if file is None:
            raise ModelError(_("The weights lack the tensor {name}.").format(name=name), file=self._folder)
        stored = file.get_slice(name)
        if stored.get_dtype() not in FLOATS:
            raise ModelError(
                _("The tensor {name} holds {dtype}, not floating-point numbers.").format(
                    name=name, dtype=stored.get_dtype()
                ),
                hint=_("Export the model before it is quantised."),
                file=self._folder,
            )
        return tuple(stored.get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()
        self._stack.close()


def _weight_files(model_folder: Path) -> list[Path]:
    index = model_folder / "model.safetensors.index.json"
    if not index.is_file():
        return [model_folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(_("The index of the weights is damaged."), file=index)
    files = sorted(set(names.values()))
    if any(Path(name).name != name for name in files):  # an index may not point out of its folder
        raise ModelError(_("The index of the weights names a file outside its folder."), file=index)
    return [model_folder / name for name in files]


def _read_shape(model_folder: Path) -> Shape:
    path = model_folder / "config.json"
    config = read_json(path)
    architecture = next(iter(config.get("architectures") or ()), None)
    family = FAMILIES.get(str(architecture))
    if family is None:
        raise ModelError(
            _("The architecture {name} cannot be written to GGUF yet.").format(name=architecture),
            hint=_("These can: {names}. Export an adapter or a merged model instead.").format(
                names=", ".join(FAMILIES)
            ),
            file=path,
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(
            _("llama.cpp runs this architecture with the activation silu only, not {name}.").format(
                name=config.get("hidden_act")
            ),
            file=path,
        )
    heads, hidden = _count(config, "num_attention_heads", path), _count(config, "hidden_size", path)
    context = _count(config, "max_position_embeddings", path)
    window = _sliding_window(config)
    notes: tuple[str, ...] = ()
    if window is not None and window < context:
        context, notes = window, (_sliding_window_note(window),)
    rope = _rope(config, family, path)
    return Shape(
        family=family,
        layers=_count(config, "num_hidden_layers", path),
        hidden=hidden,
        intermediate=_count(config, "intermediate_size", path),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", path, heads),
        head_dim=_count(config, "head_dim", path, hidden // heads),
        context=context,
        epsilon=_number(config, "rms_norm_eps", path, 1e-6),
        theta=_number(rope, "rope_theta", path, 10000.0),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        notes=notes,
    )


def _count(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(
            _("{key} must be a positive whole number, not {value}.").format(key=key, value=value), file=path
        )
    return value


def _number(config: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(_("{key} must be a positive number, not {value}.").format(key=key, value=value), file=path)
    return float(value)


def _sliding_window(config: dict[str, Any]) -> int | None:
    """The window of attention, where there is one. Qwen writes one down and says separately whether it is used."""
    window = config.get("sliding_window")
    return window if isinstance(window, int) and window > 0 and config.get("use_sliding_window", True) else None


def _sliding_window_note(window: int) -> str:
    return _("llama.cpp knows no sliding window for this architecture, so the context is the window: {window}.").format(
        window=window
    )


def _rope(config: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before, as one mapping."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in family.ropes:
        raise ModelError(
            _("llama.cpp does not scale positions in the way {name} for this architecture.").format(name=kind),
            file=path,
        )
    if kind != "default":
        _number(rope, "factor", path)
    if kind in ("yarn", "llama3"):
        original = config.get("max_position_embeddings") if kind == "yarn" else None
        rope["original"] = _count(rope, "original_max_position_embeddings", path, original)
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor", path), _number(rope, "high_freq_factor", path)
        if low >= high:
            raise ModelError(_("low_freq_factor must be less than high_freq_factor."), file=path)
    if kind == "yarn":
        _refuse_other_yarn(rope, path)
    return rope


def _refuse_other_yarn(rope: dict[str, Any], path: Path) -> None:
    """llama.cpp scales attention by the paper's 0.1 ln(factor) + 1 and truncates the ramp (arXiv:2309.00071)."""
    usual = 0.1 * math.log(rope["factor"]) + 1
    attention = rope.get("attention_factor")
    if (
        (attention is not None and not math.isclose(attention, usual, rel_tol=1e-6))
        or rope.get("mscale")
        or rope.get("mscale_all_dim")
        or rope.get("truncate") is False
    ):
        raise ModelError(
            _("llama.cpp does not scale positions in the way {name} for this architecture.").format(
                name="yarn (attention_factor, mscale, truncate)"
            ),
            file=path,
        )


def _plan_tensors(shape: Shape, source: Source, kind: Kind, model_folder: Path) -> list[Plan]:
    """Every tensor the architecture has, none missing and none left over."""
    names = list(_expected(shape, source.names()))
    left_over = {name for name in source.names() - set(names) if not DERIVED.search(name)}
    if shape.tied:
        left_over -= {HEAD}
    if left_over:
        raise ModelError(
            _("llama.cpp has no place for these tensors of the model: {names}.").format(
                names=", ".join(sorted(left_over)[:5])
            ),
            hint=_("A model with an adapter must be merged before it is exported."),
            file=model_folder,
        )
    _refuse_other_shapes(shape, source, names, model_folder)
    known = gguf.get_tensor_name_map(_architecture(shape.family), shape.layers)
    plans = []
    for name in names:
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(_("GGUF has no name for the tensor {name}.").format(name=name), file=model_folder)
        size = source.shape(name)
        plans.append(Plan(new, name, size, _storage(size, kind), _interleaved_heads(shape, name)))
    return plans


def _expected(shape: Shape, present: set[str]) -> Iterator[str]:
    yield EMBEDDING
    for layer in range(shape.layers):
        prefix = LAYER.format(layer=layer)
        yield from (prefix + name for name in shape.family.block)
        yield from (prefix + name for name in shape.family.optional if prefix + name in present)
    yield FINAL_NORM
    if not shape.tied:
        yield HEAD


def _refuse_other_shapes(shape: Shape, source: Source, names: list[str], model_folder: Path) -> None:
    """llama.cpp ends the process where a tensor is not of the size that the metadata says."""
    rows = {
        QUERY: shape.heads * shape.head_dim,
        KEY: shape.kv_heads * shape.head_dim,
        "self_attn.v_proj": shape.kv_heads * shape.head_dim,
        "mlp.gate_proj": shape.intermediate,
        "mlp.up_proj": shape.intermediate,
        "q_norm": shape.head_dim,
        "k_norm": shape.head_dim,
        "embed_tokens": source.shape(EMBEDDING)[0],
        "lm_head": source.shape(EMBEDDING)[0],
    }
    columns = {"self_attn.o_proj": shape.heads * shape.head_dim, "mlp.down_proj": shape.intermediate}
    for name in names:
        stem = name.rpartition(".")[0]
        expected = [next((rows[part] for part in rows if stem.endswith(part)), shape.hidden)]
        if name.endswith(".weight") and not stem.endswith("norm"):
            expected.append(next((columns[part] for part in columns if stem.endswith(part)), shape.hidden))
        if source.shape(name) != tuple(expected):
            raise ModelError(
                _("The tensor {name} has the shape {found}; config.json says {expected}.").format(
                    name=name, found=source.shape(name), expected=tuple(expected)
                ),
                file=model_folder,
            )


def _architecture(family: Family) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)


def _storage(size: tuple[int, ...], kind: Kind) -> int:
    if kind == "f32" or len(size) == 1:  # vectors are few and sensitive: norms and biases stay in F32
        return F32
    if kind == "q8_0" and size[-1] % gguf.GGML_QUANT_SIZES[Q8_0][0] == 0:
        return Q8_0
    return F16


def _interleaved_heads(shape: Shape, name: str) -> int:
    stem = name.rpartition(".")[0]
    if not stem.endswith(shape.family.interleaved):
        return 0
    return shape.kv_heads if stem.endswith(KEY) else shape.heads


def _write_tensors(writer: Any, shape: Shape, plans: list[Plan], source: Source) -> None:
    """The list of tensors, then each tensor, read, converted and written before the next is read."""
    frequencies = _llama3_frequencies(shape) if shape.rope["rope_type"] == "llama3" else None
    if frequencies is not None:
        writer.add_tensor_info("rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.bytes, raw_dtype=plan.storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for plan in plans:
        writer.write_tensor_data(_convert(source.tensor(plan.source), plan))


def _convert(tensor: torch.Tensor, plan: Plan) -> np.ndarray:
    """The bytes of one tensor. Raises ModelError when a value is not finite, in the source or as stored."""
    if plan.heads:
        tensor = interleave(tensor, plan.heads)
    if plan.storage == F16:
        stored = tensor.to(torch.float16)
    else:
        stored = tensor.to(torch.float32)
    if not bool(torch.isfinite(stored).all()):
        whole = bool(torch.isfinite(tensor).all())
        raise ModelError(
            (
                _("A weight of {name} is too large for F16.") if whole else _("A weight of {name} is not a number.")
            ).format(name=plan.source),
            hint=_("Export as f32 or q8_0.")
            if whole
            else _("The training diverged; go back to an earlier checkpoint."),
        )
    array = stored.contiguous().numpy()
    if plan.storage == Q8_0:
        array = gguf.quants.quantize(array, Q8_0)
    return array


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * d, ...) with each head's halves woven into pairs: 0, d/2, 1, d/2 + 1, ...

    transformers rotates element i with i + d/2, llama.cpp (for this family) 2i with 2i + 1.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


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


def _add_metadata(writer: Any, shape: Shape, vocabulary: Vocabulary, kind: Kind, title: str) -> None:
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(FILE_TYPES[kind])
    if kind == "q8_0":
        writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(len(vocabulary.tokens))
    _add_rope(writer, shape)
    _add_vocabulary(writer, vocabulary)


def _add_rope(writer: Any, shape: Shape) -> None:
    rope = shape.rope
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


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


def _safe_name(name: str) -> str:
    """llama.cpp treats the tokens of any model whose name has "phi-3" in it in another way, or fails to load it."""
    return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)
