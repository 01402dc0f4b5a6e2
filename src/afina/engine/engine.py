"""The engine: a transformers model with adapters attached, run through blocks of our own. Same numbers, less time.

It knows families, not models. What it does not know is left to the reference, with the reason in one sentence. Before
the first step it proves itself on the user's own batch (`prove`), and steps aside on a mismatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afina.engine.block import Block, Positions, Saved, make_block
from afina.engine.elementwise import cross_entropy, rms_norm, rms_norm_backward
from afina.engine.nf4 import from_bitsandbytes
from afina.engine.offload import Offload
from afina.engine.products import Scratch
from afina.language import _
from afina.model.loss import Targeted, summed_loss

FAMILIES = {"llama", "mistral", "qwen2"}
LOGITS_AT_ONCE = 2**27
"""Elements of one chunk of logits: 1,024 rows of a 128k vocabulary, 0.5 GiB in fp32."""


def why_not(model: nn.Module, longest: int) -> str | None:
    """Why the engine leaves this model to the reference; None when it takes it."""
    config: Any = model.config
    if config.model_type not in FAMILIES:
        return _("the {family} family is not fused yet").format(family=config.model_type)
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return _("its activation is {name}").format(name=config.hidden_act)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < longest:
        return _("its attention has a window of {count} tokens").format(count=window)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head % 8 or head > 256:
        return _("its heads are {count} wide").format(count=head)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(".lora_A." not in name and ".lora_B." not in name for name in learning):
        return _("more than low-rank adapters learns")
    if any(".layers." not in name or not (".self_attn." in name or ".mlp." in name) for name in learning):
        return _("an adapter lies on a layer that is not fused")
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        if len(module.active_adapters) != 1 or any(getattr(module, "use_dora", {}).values()):
            return _("its adapters are not plain LoRA")
        if any(getattr(part, "p", 0) for part in module.lora_dropout.values()):
            return _("adapters with dropout are not fused yet")
        if type(module.base_layer) is not nn.Linear and from_bitsandbytes(module.base_layer.weight) is None:
            return _("its base layers are {kind}").format(kind=type(module.base_layer).__name__)
    return None


@dataclass(frozen=True)
class Plan:
    """What is kept for the backward: `tokens` of a micro-batch, `kept` layers that keep gate_up, `bytes` in all."""

    tokens: int
    kept: int
    bytes: int


class Engine:
    """The fused model. `summed_loss(model, batch)` is a loss function for the loop; the batch must be packed."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        whole = _transformers_model(model)
        self.embedding: torch.Tensor = whole.model.embed_tokens.weight.detach()
        scratch, dtype = Scratch(), self.embedding.dtype
        self.blocks: list[Block] = [make_block(layer, config, scratch, dtype) for layer in whole.model.layers]
        self.norm: torch.Tensor = whole.model.norm.weight.detach().to(dtype)
        self.head: torch.Tensor = whole.lm_head.weight.detach()
        self.eps = float(config.rms_norm_eps)
        self._rotary = whole.model.rotary_emb
        self._products = [product for block in self.blocks for product in block.products]
        self.parameters = [parameter for product in self._products for parameter in product.parameters()]

    def summed_loss(self, _model: nn.Module, batch: Targeted) -> torch.Tensor:
        """Sum of the loss over the batch's targets, differentiable in the adapters."""
        self._refresh()
        if not torch.is_grad_enabled():
            hidden, _saved = self._hidden(batch, self._positions(batch), save=False)
            return self._head_loss(hidden, batch, gradient=False)[0]
        loss: torch.Tensor = _Run.apply(self, batch, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def plan(self, tokens: int, least: int, free_bytes: int) -> Plan:
        """Choose how many tokens are computed at once, from `tokens` down to `least`, and what is kept of them.

        Making gate_up again costs a sixth of a step, fewer tokens at once cost next to nothing while there are some
        thousands: so tokens are halved first, and only a micro-batch of `least` tokens makes something again.
        """
        layers, needed = len(self.blocks), self._needed(tokens)
        while needed + layers * self._gate_up(tokens) > free_bytes and tokens // 2 >= least:
            tokens //= 2
            needed = self._needed(tokens)
        kept = max(0, min(layers, (free_bytes - needed) // self._gate_up(tokens)))
        self.place(kept, 0)
        return Plan(tokens, kept, needed + kept * self._gate_up(tokens))

    def place(self, kept: int, away: int) -> None:
        """The last `kept` layers keep gate_up, the `away` before these send it away, the first make it again."""
        layers, offload = len(self.blocks), Offload() if away else None
        for place, block in enumerate(self.blocks):
            block.offload = offload
            block.gate_up_waits = (
                "here" if place >= layers - kept else "away" if place >= layers - kept - away else "not"
            )

    def _gate_up(self, tokens: int) -> int:
        return tokens * max(block.gate_up.n for block in self.blocks) * self.embedding.element_size()

    def _needed(self, tokens: int) -> int:
        """Bytes a step of `tokens` needs besides gate_up: what layers save, the widest layer's work, the logits."""
        element, hidden = self.embedding.element_size(), self.embedding.shape[1]
        saved = sum(2 * hidden + block.qkv.n + block.o.k + sum(p.r for p in block.products) for block in self.blocks)
        widest = max(self.blocks, key=lambda block: block.gate_up.n)
        work = 2 * widest.gate_up.n + 2 * widest.down.k + 2 * widest.qkv.n + 6 * hidden
        return tokens * (saved + work) * element + LOGITS_AT_ONCE * (4 + element)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Take over the adapters as they are now: always, as a fused optimiser does not tell that it changed them."""
        for product in self._products:
            product.refresh()

    @torch.no_grad()
    def _positions(self, batch: Targeted) -> Positions:
        if batch.lengths is None:
            raise RuntimeError("the engine runs packed batches only")
        like = torch.zeros(
            1, dtype=torch.promote_types(self.embedding.dtype, torch.float32), device=self.embedding.device
        )
        cos, sin = self._rotary(like, batch.position_ids)
        half = cos.shape[-1] // 2
        return Positions(batch.lengths, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())

    def _hidden(self, batch: Targeted, at: Positions, *, save: bool) -> tuple[torch.Tensor, list[Saved | None]]:
        x = nn.functional.embedding(batch.input_ids[0], self.embedding)
        saved: list[Saved | None] = []
        for block in self.blocks:
            x, kept = block.forward(x, at, save=save)
            saved.append(kept)
        if save and self.blocks[0].offload is not None:
            self.blocks[0].offload.settle()
        return x, saved

    def _head_loss(
        self, hidden: torch.Tensor, batch: Targeted, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss at the predicting rows, and `hidden`'s gradient in rows wide enough for the last layer's backward."""
        rows = hidden[batch.predicting]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        wide = d_rows = None
        if gradient:
            wide = hidden.new_zeros(hidden.shape[0], hidden.shape[1] + self.blocks[-1].down.r)
            d_rows = torch.empty_like(rows)
        step = max(1, LOGITS_AT_ONCE // self.head.shape[0])
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step]
            normed = rms_norm(chunk, self.norm, self.eps, torch.empty_like(chunk))
            logits = _logits(normed, self.head)
            slopes = torch.empty_like(logits, dtype=hidden.dtype)
            total += cross_entropy(logits, batch.targets[start : start + step], slopes).sum()
            if d_rows is not None:
                d_normed = torch.mm(slopes, self.head)
                rms_norm_backward(d_normed, chunk, self.norm, self.eps, d_rows[start : start + step])
        if wide is not None and d_rows is not None:
            wide[:, : hidden.shape[1]].index_copy_(0, batch.predicting, d_rows)
        return total, wide

    def forward(self, batch: Targeted) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """The loss, and what `backward` needs."""
        at = self._positions(batch)
        hidden, saved = self._hidden(batch, at, save=True)
        loss, wide = self._head_loss(hidden, batch, gradient=True)
        return loss, (at, saved, wide)

    def backward(self, d_loss: torch.Tensor, kept: tuple[Any, ...]) -> list[torch.Tensor]:
        """The adapters' gradients, in the order of `parameters`; layers are let go as they are done."""
        at, saved, wide = kept
        wide.mul_(d_loss)
        gradients: list[list[torch.Tensor]] = []
        for place in range(len(self.blocks) - 1, -1, -1):
            below = self.blocks[place - 1].down.r if place else None
            if place:
                self.blocks[place - 1].expect(saved[place - 1])
            wide, found = self.blocks[place].backward(wide, saved.pop(), at, below)
            gradients.append(found)
        return [gradient for found in reversed(gradients) for gradient in found]


class _Run(torch.autograd.Function):
    """The whole model as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, batch: Targeted, *_parameters: nn.Parameter) -> torch.Tensor:
        loss, ctx.kept = engine.forward(batch)
        ctx.engine = engine
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[Any, ...]:
        kept, ctx.kept = ctx.kept, None
        return None, None, *ctx.engine.backward(d_loss, kept)


def _transformers_model(model: nn.Module) -> Any:
    """The transformers model itself, with or without PEFT around it."""
    whole: Any = model
    return whole.get_base_model() if hasattr(model, "get_base_model") else whole


def _logits(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary), in fp32 from 16-bit factors on a GPU, so that nothing is rounded between product and loss."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, head.t(), out_dtype=torch.float32)
    return torch.mm(rows, head.t())


@dataclass(frozen=True)
class Proof:
    """The largest relative differences between engine and reference on one batch."""

    loss: float
    gradient: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether engine and reference agree to the rounding of their arithmetic."""
        return self.loss <= self.tolerance and self.gradient <= 10 * self.tolerance


def prove(
    engine: Engine, model: nn.Module, batch: Targeted, autocast: torch.autocast, parameters: Sequence[nn.Parameter]
) -> Proof:
    """Compare loss and adapter gradients with the reference on `batch`, every B perturbed: with B = 0 dA is zero.

    The adapters are as before afterwards.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad():
        for product in engine._products:
            for adapter in product.adapters:
                noise = torch.randn(adapter.b.shape, generator=generator) * 0.02
                adapter.b.add_(noise.to(adapter.b))
    found = []
    for loss_fn in (engine.summed_loss, summed_loss):
        with autocast:
            loss = loss_fn(model, batch)
        gradients = torch.autograd.grad(loss, list(parameters))
        found.append((loss.item(), [gradient.float() for gradient in gradients]))
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    (ours, our_gradients), (theirs, their_gradients) = found
    error = sum((a - b).square().sum().item() for a, b in zip(our_gradients, their_gradients, strict=True)) ** 0.5
    norm = sum(gradient.square().sum().item() for gradient in their_gradients) ** 0.5
    tolerance = 1e-5 if engine.embedding.dtype in (torch.float32, torch.float64) else 5e-3
    return Proof(abs(ours - theirs) / max(abs(theirs), 1e-9), error / max(norm, 1e-12), tolerance)
