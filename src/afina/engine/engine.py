"""The engine: a transformers model with what learns in it, run through blocks of our own. Same numbers, less time.

It knows families, not models. What it does not know is left to the reference, with the reason in one sentence. Before
the first step it proves itself on the user's own batch (proof.py), and steps aside on a mismatch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from afina.engine.block import Block, Placement, Positions, Saved
from afina.engine.families import final_norm, make_block, turned_half
from afina.engine.head import Ends, Host
from afina.engine.offload import Offload
from afina.engine.plan import KNOWN, Plan, choose
from afina.engine.products import Product, Scratch, copying
from afina.model.loss import Targeted


class Engine:
    """The fused model. `summed_loss(model, batch)` is a loss function for the loop; the batch must be packed.

    dtype: what is computed in; unset, what the weights are in. copy: puts what learns into its places, None where they
    are to be found anew. scratches: what layers fill and use in turn.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        config: Any = model.config
        whole: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        inside, head = whole.model, whole.lm_head
        self.dtype = dtype or inside.embed_tokens.weight.dtype
        self.scratches = [Scratch()]
        layers = enumerate(inside.layers)
        self.blocks: list[Block] = [make_block(layer, config, n, self.scratches[0], self.dtype) for n, layer in layers]
        self.ends = _ends(inside.embed_tokens.weight, head, final_norm(inside, self.dtype), self.dtype)
        self._rotary, self._config = inside.rotary_emb, config
        self.copy: Callable[[], None] | None = None
        self._training = lambda: model.training
        self.parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        self.parameters += self.ends.parameters()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.ends.norm.weight.device

    @property
    def products(self) -> list[Product]:
        """Of all layers."""
        return [product for block in self.blocks for product in block.products]

    @property
    def to_come(self) -> int:
        """Bytes that the first step takes for good, beside what is planned."""
        return sum(scratch.to_come for scratch in self.scratches)

    def summed_loss(self, _model: nn.Module, batch: Targeted) -> torch.Tensor:
        """Sum of the loss over the batch's targets, differentiable in what learns."""
        self.refresh()
        if not torch.is_grad_enabled():
            with torch.autocast(self.device.type, enabled=False):
                hidden, _saved = self._hidden(*self.rows(batch, None), save=False)
                return self.ends.loss(hidden, batch, None)[0]
        loss: torch.Tensor = _Run.apply(self, batch, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def plan(self, tokens: int, least: int, free_bytes: int, known: Plan | None = None) -> Plan:
        """Choose how many tokens are computed at once, from `tokens` down to `least`, and what of them waits where.

        known: the plan of an earlier sitting of the same run, taken again where it still fits: rates are measured, so
        that another might be chosen.
        """
        fits = known is not None and known.bytes <= free_bytes * KNOWN and len(known.placements) == len(self.blocks)
        plan = known if known is not None and fits else choose(self, tokens, least, free_bytes)
        self.place(plan.placements, rows_at_once=plan.rows_at_once, host=plan.host, held=plan.held)
        return plan

    def place(
        self, placements: list[Placement], *, rows_at_once: int = 0, host: Host = "neither", held: int = 0
    ) -> None:
        """Say layer by layer what waits where, how the widest products are cut, and which ends leave the GPU.

        held: so many of the last layers with four-bit weights keep them in the precision that is computed in too.
        """
        offload = Offload() if any(placement.away for placement in placements) else None
        for block, placement in zip(self.blocks, placements, strict=True):
            block.placement, block.offload, block.rows_at_once = placement, offload, rows_at_once
        for block in self.blocks[len(self.blocks) - held :]:
            block.hold()
        self.copy = None
        self.ends.leave(host)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what learns as it is now: always, as a fused optimiser does not tell that it changed it."""
        if self.copy is None:
            norms = [self.ends.norm, *(by for block in self.blocks for by in block.norms)]
            copies = [part.placed() for part in self.products] + [by.copies() for by in norms]
            self.copy = copying([copy for part in copies for copy in part])
        self.copy()
        for scratch in self.scratches:
            scratch.forget()
        if self.ends.learnt:
            self.ends.refresh()

    @torch.no_grad()
    def rows(self, batch: Targeted, seed: int | None) -> tuple[torch.Tensor, Positions]:
        """The tokens (tokens,) that are computed, and where each stands."""
        if batch.lengths is None:
            raise RuntimeError("the engine runs packed batches only")
        like = torch.zeros(1, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        cos, sin = self._rotary(like, batch.position_ids)
        half = turned_half(self._config, cos)
        at = Positions(batch.lengths, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), seed)
        return batch.input_ids[0], at

    def _hidden(self, ids: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, list[Saved | None]]:
        x = self.ends.embed(ids)
        saved: list[Saved | None] = []
        offload = self.blocks[0].offload if save else None
        for block in self.blocks:
            if offload is not None and block is self.blocks[-1] and not block.placement.away:
                offload.settle()  # what is still leaving would lie beside all that is saved
            x, kept = block.forward(x, at, save=save)
            saved.append(kept)
        if offload is not None:
            offload.settle()
        return x, saved

    def forward(self, batch: Targeted) -> tuple[torch.Tensor, list[Any]]:
        """The loss, and what `backward` needs."""
        drops = self._training() and any(product.dropout for product in self.products)
        ids, at = self.rows(batch, int(torch.randint(2**48, ())) if drops else None)
        hidden, saved = self._hidden(ids, at, save=True)
        loss, kept = self.ends.loss(hidden, batch, self.blocks[-1].extra)
        return loss, [at, saved, kept, ids]

    def backward(self, d_loss: torch.Tensor, kept: list[Any]) -> list[torch.Tensor]:
        """The gradients of what learns, in the order of `parameters`; layers are let go as they are done."""
        at, saved, (wide, found), ids = kept
        kept.clear()
        wide.mul_(d_loss)
        gradients: list[list[torch.Tensor]] = []
        for place in range(len(self.blocks) - 1, -1, -1):
            below = self.blocks[place - 1].extra if place else (0 if self.ends.learnt else None)
            if place:
                self.blocks[place - 1].expect(saved[place - 1])
            wide, of_block = self.blocks[place].backward(wide, saved.pop(), at, below)
            gradients.append(of_block)
        of_ends = self.ends.gradients(found, ids, wide, d_loss)
        return [*(gradient for of_block in reversed(gradients) for gradient in of_block), *of_ends]


class _Run(torch.autograd.Function):
    """The whole model as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, batch: Targeted, *_parameters: nn.Parameter) -> torch.Tensor:
        ctx.engine = engine
        with torch.autocast(engine.device.type, enabled=False):
            loss, ctx.kept = engine.forward(batch)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[Any, ...]:
        kept, ctx.kept = ctx.kept, None
        with torch.autocast(ctx.engine.device.type, enabled=False):
            return None, None, *ctx.engine.backward(d_loss, kept)


def _ends(embedding: nn.Parameter, head: Any, norm: Any, dtype: torch.dtype) -> Ends:
    """Shared with the transformers model, unless they learn in another precision."""
    tied = head.weight is embedding
    ours = [part.detach().to(dtype) for part in (embedding, head.weight)]
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    learnt = tuple(part for part in (embedding, None if tied else head.weight, head.bias) if part is not None)
    shared = (embedding,) if tied else (embedding, head.weight)
    return Ends(
        ours[0], ours[0] if tied else ours[1], bias, norm, learnt if embedding.requires_grad else (), shared=shared
    )
