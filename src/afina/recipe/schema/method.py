"""`method`: what learns."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from afina.recipe.schema.section import Section, Share


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
    """Which linear layers get an adapter; the head never does."""
    experts: bool = False
    """Every matrix of a mixture's experts gets an adapter too (gpt-oss); packed ones stay packed."""
    router: bool = False
    """What chooses the experts gets an adapter too."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases learn too."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv:2312.03732)."""


class Full(Section):
    """Every weight learns."""

    name: Literal["full"]
    """The method."""


def _method_name(method: Any) -> str | None:
    """Which method a mapping means; LoRA where it does not say."""
    name = method.get("name", "lora") if isinstance(method, dict) else getattr(method, "name", None)
    return name if isinstance(name, str) else None


Method = Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(_method_name)]
