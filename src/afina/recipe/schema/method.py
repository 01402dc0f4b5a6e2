"""`method`: what learns."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from afina.recipe.schema.section import Section, Share

Layers = Annotated[list[int], Field(min_length=1, examples=[[-4, -3, -2, -1]])]
"""Numbers of decoder layers."""
VirtualTokens = Annotated[int, Field(ge=1, le=4096)]


class Lora(Section):
    """Low-rank adapters on frozen weights (Hu et al., 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    """The method."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Width of the two added matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped while training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all but the head, or those of these names, such as q_proj, or patterns of
    whole names, such as `*.mlp.*`."""
    experts: bool = False
    """Every matrix of a mixture's experts gets an adapter too (gpt-oss); packed ones stay packed."""
    router: bool = False
    """What chooses the experts gets an adapter too."""
    layers: Layers | None = None
    """Only these decoder layers get adapters, counted from 0, or from the end with -1 as the last."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases learn too."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each row's length apart from its direction (Liu et al., 2024, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "loftq"] = "default"
    """How adapters begin. pissa: as the base's largest singular parts (arXiv:2404.02948). loftq: as what quantising the
    base loses (arXiv:2310.08659). The others: adding nothing."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """The second matrix learns at this many times the learning rate (LoRA+, arXiv:2402.12354, which advises 16)."""
    modules_to_save: Annotated[list[str], Field(examples=[["embed_tokens", "lm_head"]])] = []
    """Modules that learn whole, beside the adapters."""


class Full(Section):
    """Every weight learns."""

    name: Literal["full"]
    """The method."""
    layers: Layers | None = None
    """Only these decoder layers learn, counted from 0, or from the end with -1 as the last."""
    keep_zeros: bool = False
    """Weights of linear layers that are zero stay so: how a pruned model learns again. (An adapter, merged, fills
    them.)"""


class PromptTuning(Section):
    """Virtual tokens before every conversation learn, and nothing else (Lester et al., 2021, arXiv:2104.08691)."""

    name: Literal["prompt-tuning"]
    """The method."""
    virtual_tokens: VirtualTokens = 20
    """How many. They come on top of max_length."""
    text: str | None = Field(default=None, examples=["Tell positive, neutral and negative reviews apart."])
    """They begin as the tokens of this text, repeated or cut; unset: as tokens drawn from the vocabulary."""


class PrefixTuning(Section):
    """Keys and values before every conversation learn, in each layer (Li & Liang, 2021, arXiv:2101.00190)."""

    name: Literal["prefix-tuning"]
    """The method."""
    virtual_tokens: VirtualTokens = 20
    """How many. They come on top of max_length."""


def _method_name(method: Any) -> str | None:
    """Which method a mapping means; LoRA where it does not say."""
    name = method.get("name", "lora") if isinstance(method, dict) else getattr(method, "name", None)
    return name if isinstance(name, str) else None


Method = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[Full, Tag("full")]
    | Annotated[PromptTuning, Tag("prompt-tuning")]
    | Annotated[PrefixTuning, Tag("prefix-tuning")],
    Discriminator(_method_name),
]
