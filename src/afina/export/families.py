"""The architectures that llama.cpp runs as we train them: a table of families, and a model's figures, checked.

A family says which tensors each layer has, in what order llama.cpp wants the rows of the query and key projections,
which scalings of positions and which activation its graph honours. `read_shape` reads config.json against that table.
Knows nothing of files in GGUF.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import ModelError
from afina.export.gguf_vocab import read_json
from afina.export.yarn import turned_otherwise, yarn_note
from afina.language import _

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
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BLOCK = (*NORMS, *(f"{name}.weight" for name in PROJECTIONS))
BIASES = tuple(f"{name}.bias" for name in PROJECTIONS)
PHI2_LINEAR = (*PROJECTIONS[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
GPT_OSS_BLOCK = (
    *NORMS,
    *(f"{name}.{part}" for name in PROJECTIONS[:4] for part in ("weight", "bias")),
    "self_attn.sinks.weight",
    "mlp.router.weight",
    "mlp.router.bias",
    *(f"mlp.experts.{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("weight", "bias")),
)
GPT_OSS_SWIGLU = (1.702, 7.0)
"""The gain and the limit of the experts' activation, which llama.cpp knows by heart."""
SCALED = frozenset({"default", "linear", "yarn"})


@dataclass(frozen=True)
class Family:
    """What llama.cpp's graph of an architecture reads.

    `architecture` is llama.cpp's name. Every layer has the tensors of `block` and may have those of `optional`; `last`
    stand after the layers, `head` where it is not tied. `interleaved` projections have their rows, per head, as pairs
    (0, d/2), (1, d/2 + 1), ...: llama.cpp rotates neighbours there, transformers rotates halves. `ropes` are the
    scalings of positions that the graph honours, `activation` the function inside the MLP. `window`: the graph knows
    attention windows in every second layer. `norms_from_one`: the norms are stored as their distance from 1.
    """

    architecture: str
    block: tuple[str, ...] = BLOCK
    optional: tuple[str, ...] = ()
    last: tuple[str, ...] = (FINAL_NORM,)
    head: tuple[str, ...] = (HEAD,)
    interleaved: tuple[str, ...] = ()
    ropes: frozenset[str] = SCALED
    activation: str = "silu"
    epsilon: str = "rms_norm_eps"
    window: bool = False
    norms_from_one: bool = False


LLAMA = Family("llama", optional=BIASES, interleaved=(QUERY, KEY), ropes=SCALED | {"llama3"})
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", block=(*BLOCK, *BIASES[:3])),
    "Qwen3ForCausalLM": Family("qwen3", block=(*BLOCK, "self_attn.q_norm.weight", "self_attn.k_norm.weight")),
    "PhiForCausalLM": Family(
        "phi2",
        block=tuple(f"{name}.{part}" for name in ("input_layernorm", *PHI2_LINEAR) for part in ("weight", "bias")),
        last=("model.final_layernorm.weight", "model.final_layernorm.bias"),
        head=(HEAD, "lm_head.bias"),
        ropes=frozenset({"default"}),
        activation="gelu_new",
        epsilon="layer_norm_eps",
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        block=(
            *NORMS,
            "self_attn.qkv_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.gate_up_proj.weight",
            "mlp.down_proj.weight",
        ),
        ropes=frozenset({"default", "longrope"}),
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        block=(*BLOCK, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
        ropes=frozenset({"default"}),
        activation="gelu_pytorch_tanh",
        window=True,
        norms_from_one=True,
    ),
    "GptOssForCausalLM": Family(
        "gpt-oss",
        block=GPT_OSS_BLOCK,
        ropes=frozenset({"default", "yarn"}),
        window=True,
    ),
}
GEMMA2_27B_LAYERS = 46
"""llama.cpp knows by this number of layers that the 27B model divides attention by another root."""


@dataclass(frozen=True)
class Shape:
    """The figures of a model: its config.json, checked. `rope` holds `rope_type` and what belongs to that type;
    `rotated` is how many of a head's dimensions turn; `softcaps` those of attention and of the logits; `experts` how
    many there are and how many a token goes to, or zeros."""

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
    rotated: int
    tied: bool
    window: int | None
    softcaps: tuple[float | None, float | None]
    experts: tuple[int, int]
    notes: tuple[str, ...]
    turned_otherwise: bool = False

    def expected(self, present: set[str]) -> Iterator[str]:
        """The names of every tensor that the architecture has, in the order in which they are written."""
        yield EMBEDDING
        for layer in range(self.layers):
            prefix = LAYER.format(layer=layer)
            yield from (prefix + name for name in self.family.block)
            yield from (prefix + name for name in self.family.optional if prefix + name in present)
        yield from self.family.last
        if not self.tied:
            yield from self.family.head

    def size(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """What the figures say a tensor's shape is."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {
            "q_proj": queries,
            "k_proj": keys,
            "v_proj": keys,
            "qkv_proj": queries + 2 * keys,
            "gate_proj": self.intermediate,
            "up_proj": self.intermediate,
            "fc1": self.intermediate,
            "gate_up_proj": 2 * self.intermediate,
            "q_norm": self.head_dim,
            "k_norm": self.head_dim,
            "embed_tokens": vocabulary,
            "lm_head": vocabulary,
            "router": self.experts[0],
            "sinks": self.heads,
        }
        columns = {"o_proj": queries, "dense": queries, "down_proj": self.intermediate, "fc2": self.intermediate}
        stem, _dot, part = name.rpartition(".")
        role = stem.rpartition(".")[2]
        first = rows.get(role, self.hidden)
        vector = part == "bias" or role.endswith(("norm", "sinks"))
        each = (self.experts[0],) if ".experts." in name else ()
        return (*each, first) if vector else (*each, first, columns.get(role, self.hidden))

    def interleaved_heads(self, name: str) -> int:
        """How many heads the rows of an interleaved projection belong to, else 0."""
        stem = name.rpartition(".")[0]
        if not stem.endswith(self.family.interleaved) or not self.family.interleaved:
            return 0
        return self.kv_heads if stem.endswith(KEY) else self.heads


def read_shape(model_folder: Path) -> Shape:
    """The figures of a model folder. Raises ModelError when llama.cpp could not run such a model as it was trained."""
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
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation or config.get("qk_layernorm"):
        raise ModelError(
            _("llama.cpp runs this architecture with the activation {known} only, not {name}.").format(
                known=family.activation, name=activation if activation != family.activation else "qk_layernorm"
            ),
            file=path,
        )
    heads, hidden = _count(config, "num_attention_heads", path), _count(config, "hidden_size", path)
    context, window = _count(config, "max_position_embeddings", path), _sliding_window(config)
    notes: tuple[str, ...] = ()
    if window is not None and window < context and not family.window:
        context, notes = window, (_sliding_window_note(window),)
    rope = _rope(config, family, path)
    if rope["rope_type"] == "longrope":
        notes += (_longrope_note(rope["original"]),)
    head_dim = _count(config, "head_dim", path, hidden // heads)
    theta = _number(rope, "rope_theta", path, 10000.0)
    turned = turned_otherwise(rope, theta, head_dim)
    if turned:
        notes += (yarn_note(turned),)
    shape = Shape(
        family=family,
        layers=_count(config, "num_hidden_layers", path),
        hidden=hidden,
        intermediate=_count(config, "intermediate_size", path),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", path, heads),
        head_dim=head_dim,
        context=context,
        epsilon=_number(config, family.epsilon, path, 1e-6),
        theta=theta,
        rope=rope,
        rotated=int(head_dim * _number(rope | config, "partial_rotary_factor", path, 1.0)),
        tied=bool(config.get("tie_word_embeddings", family.norms_from_one)),
        window=window if family.window else None,
        softcaps=(config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")),
        experts=_experts(config, path) if family.architecture == "gpt-oss" else (0, 0),
        notes=notes,
        turned_otherwise=turned > 0,
    )
    if family.architecture == "gpt-oss":
        _refuse_other_gpt_oss(shape, config, path)
    elif family.window:
        _refuse_other_gemma(shape, config, path)
    return shape


def _experts(config: dict[str, Any], path: Path) -> tuple[int, int]:
    return _count(config, "num_local_experts", path), _count(config, "num_experts_per_tok", path)


def _refuse_other_gpt_oss(shape: Shape, config: dict[str, Any], path: Path) -> None:
    """llama.cpp's gpt-oss: windows in every second layer from the first, a head of its own, one activation."""
    kinds = config.get("layer_types") or []
    swiglu = (config.get("swiglu_alpha", GPT_OSS_SWIGLU[0]), config.get("swiglu_limit", GPT_OSS_SWIGLU[1]))
    if kinds and kinds != _windows_in_turns(shape.layers):
        name = "layer_types"
    elif shape.tied or shape.window is None:
        name = "tie_word_embeddings, sliding_window"
    elif swiglu != GPT_OSS_SWIGLU:
        name = "swiglu_alpha, swiglu_limit"
    else:
        return
    raise _unusual(name, path)


def _windows_in_turns(layers: int) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]


def _unusual(name: str, path: Path) -> ModelError:
    return ModelError(
        _("llama.cpp runs this architecture with its usual settings only, and these differ: {name}.").format(name=name),
        file=path,
    )


def _refuse_other_gemma(shape: Shape, config: dict[str, Any], path: Path) -> None:
    """llama.cpp's Gemma 2: windows in every second layer from the first, queries divided by a root of its choice."""
    root = shape.hidden // shape.heads if shape.layers == GEMMA2_27B_LAYERS else shape.head_dim
    kinds = config.get("layer_types") or []
    if config.get("query_pre_attn_scalar", root) != root:
        name = "query_pre_attn_scalar"
    elif kinds and kinds != _windows_in_turns(shape.layers):
        name = "layer_types"
    elif not shape.tied or None in shape.softcaps:
        name = "tie_word_embeddings, attn_logit_softcapping, final_logit_softcapping"
    else:
        return
    raise _unusual(name, path)


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


def _longrope_note(original: int) -> str:
    return _(
        "llama.cpp turns positions as for long texts whenever its context (num_ctx, -c) exceeds {original} tokens; "
        "give it no more for short ones."
    ).format(original=original)


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
    if kind not in ("default", "longrope"):
        _number(rope, "factor", path)
    if kind in ("yarn", "llama3"):
        original = config.get("max_position_embeddings") if kind == "yarn" else None
        rope["original"] = _count(rope, "original_max_position_embeddings", path, original)
    if kind == "longrope":
        _read_longrope(rope, config, path)
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor", path), _number(rope, "high_freq_factor", path)
        if low >= high:
            raise ModelError(_("low_freq_factor must be less than high_freq_factor."), file=path)
    if kind == "yarn":
        for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            rope[key] = _number({key: rope.get(key) or usual}, key, path)
        _refuse_other_yarn(rope, family, path)
    return rope


def _read_longrope(rope: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Phi-3's two tables of divisors, for texts within the original context and beyond (arXiv:2402.13753)."""
    context = _count(config, "max_position_embeddings", path)
    for key in ("long_factor", "short_factor"):
        table = rope.get(key)
        if not isinstance(table, list) or not all(isinstance(value, int | float) and value > 0 for value in table):
            raise ModelError(_("{key} must be a list of positive numbers.").format(key=key), file=path)
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    rope["original"] = original = _count(
        {"original_max_position_embeddings": original}, "original_max_position_embeddings", path, context
    )
    ratio = context / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    rope["attention"] = float(rope.get("attention_factor") or usual)


def _refuse_other_yarn(rope: dict[str, Any], family: Family, path: Path) -> None:
    """llama.cpp scales attention by the paper's 0.1 ln(factor) + 1 and truncates the ramp (arXiv:2309.00071).

    gpt-oss does not truncate it, is run by llama.cpp all the same, and gets a note.
    """
    usual = 0.1 * math.log(rope["factor"]) + 1
    attention = rope.get("attention_factor")
    if (
        (attention is not None and not math.isclose(attention, usual, rel_tol=1e-6))
        or rope.get("mscale")
        or rope.get("mscale_all_dim")
        or (rope.get("truncate") is False and family.architecture != "gpt-oss")
    ):
        raise ModelError(
            _("llama.cpp does not scale positions in the way {name} for this architecture.").format(
                name="yarn (attention_factor, mscale, truncate)"
            ),
            file=path,
        )
