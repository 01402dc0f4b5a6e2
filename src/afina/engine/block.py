"""One decoder layer as a forward and a backward, its saved tensors named: the Llama family (Llama, Mistral, Qwen 2).

    h = x + o(attention(rotate(qkv(norm(x)))))          y = h + down(swiglu(gate_up(norm(h))))

What the backward needs is either saved (`Saved`) or made again from it by one pass over memory: the norms' outputs
and SwiGLU's product are never kept. Keeping `gate_up` is the lever of memory: it is 61% of what a Llama-3 layer saves;
a layer may have it wait in the computer's memory, or make it again by one product instead (`gate_up_waits`).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from afina.engine.attention import Attended, attend, attend_backward
from afina.engine.elementwise import (
    gather_rotated,
    rms_norm,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_backward,
)
from afina.engine.offload import Offload, Parked
from afina.engine.products import Product, Scratch, make_product


@dataclass(frozen=True)
class Positions:
    """Where each token stands: the samples' lengths and the angles' cosines and sines, (tokens, width / 2) fp32."""

    lengths: tuple[int, ...]
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class Saved:
    """What a layer's forward leaves for its backward; tokens first in every shape.

    x: (tokens, hidden) the layer's input. qkv: (tokens, columns) with positions turned in. attended: attention's own.
    h: (tokens, hidden). gate_up: (tokens, 2 intermediate), or None when it is made again. low_*: x A^T of each product.
    """

    x: torch.Tensor
    qkv: torch.Tensor
    attended: Attended
    h: torch.Tensor
    gate_up: torch.Tensor | Parked | None
    low_qkv: torch.Tensor
    low_o: torch.Tensor
    low_gate_up: torch.Tensor
    low_down: torch.Tensor


@dataclass
class Block:
    """A layer's products and norms, shared with the transformers layer it was made from."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    norm_attention: torch.Tensor
    norm_mlp: torch.Tensor
    eps: float
    heads: int
    kv_heads: int
    head_width: int
    gate_up_waits: Literal["here", "away", "not"] = "here"
    offload: Offload | None = None

    @property
    def products(self) -> tuple[Product, ...]:
        """All four, in the order in which `backward` returns gradients."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def scaling(self) -> float:
        """Of attention's scores."""
        return float(self.head_width**-0.5)

    def forward(self, x: torch.Tensor, at: Positions, *, save: bool) -> tuple[torch.Tensor, Saved | None]:
        """x: (tokens, hidden). Returns the layer's output, and what the backward needs when `save`."""
        wide = self._normed(x, self.norm_attention, self.qkv)
        qkv = self.qkv.forward(wide)
        low_qkv = self.qkv.low_of(wide)
        rotate(qkv, at.cos, at.sin, self.heads + self.kv_heads)
        attended = attend(*self._split(qkv), at.lengths, self.scaling)
        h, low_o = self.o.forward_narrow(attended.out.flatten(1), residual=x)

        wide = self._normed(h, self.norm_mlp, self.gate_up)
        gate_up = self.gate_up.forward(wide)
        low_gate_up = self.gate_up.low_of(wide)
        wide = x.new_empty(x.shape[0], self.down.k + self.down.r)
        swiglu(gate_up, wide[:, : self.down.k])
        y = self.down.forward(wide, residual=h)
        if not save:
            return y, None
        kept: torch.Tensor | Parked | None = gate_up if self.gate_up_waits == "here" else None
        if self.gate_up_waits == "away" and self.offload is not None:
            kept = self.offload.send(gate_up)
        return y, Saved(x, qkv, attended, h, kept, low_qkv, low_o, low_gate_up, self.down.low_of(wide))

    def backward(
        self, wide_dy: torch.Tensor, saved: Saved, at: Positions, below: int | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """wide_dy: (tokens, hidden + down.r), the output's gradient in its first columns.

        Returns dx in rows with `below` extra columns (None: the first layer, whose dx nobody needs), and the adapters'
        gradients, product by product in the order of `products`.
        """
        hidden = saved.x.shape[1]
        n = saved.x.new_empty(saved.x.shape)

        gate_up = self._again(saved)
        self.down.widen(wide_dy)
        d_act = self.down.backward(wide_dy)
        wide_d = self._room(saved.x, self.gate_up)
        act = swiglu_backward(d_act, gate_up, wide_d[:, : self.gate_up.n])
        saved.gate_up = None
        of_down = self.down.gradients(wide_dy, act, saved.low_down)
        del d_act, act, gate_up
        self.gate_up.widen(wide_d)
        d_n = self.gate_up.backward(wide_d)
        wide_dh = self._room(saved.x, self.o)
        rms_norm_backward(d_n, saved.h, self.norm_mlp, self.eps, wide_dh[:, :hidden], residual=wide_dy[:, :hidden], y=n)
        of_gate_up = self.gate_up.gradients(wide_d, n, saved.low_gate_up)

        self.o.widen(wide_dh)
        d_out = self.o.backward(wide_dh)
        of_o = self.o.gradients(wide_dh, saved.attended.out.flatten(1), saved.low_o)
        wide_d = self._room(saved.x, self.qkv)
        heads = self._split(saved.qkv)
        d_heads = attend_backward(saved.attended, d_out.view_as(saved.attended.out), *heads, at.lengths, self.scaling)
        gather_rotated(d_heads, at.cos, at.sin, wide_d[:, : self.qkv.n])
        self.qkv.widen(wide_d)
        dx = None
        if below is not None:
            d_n = self.qkv.backward(wide_d)
            dx = saved.x.new_empty(saved.x.shape[0], hidden + below)
            rms_norm_backward(
                d_n, saved.x, self.norm_attention, self.eps, dx[:, :hidden], residual=wide_dh[:, :hidden], y=n
            )
        else:
            rms_norm(saved.x, self.norm_attention, self.eps, n)
        of_qkv = self.qkv.gradients(wide_d, n, saved.low_qkv)
        return dx, [*of_qkv, *of_o, *of_gate_up, *of_down]

    def _normed(self, x: torch.Tensor, weight: torch.Tensor, product: Product) -> torch.Tensor:
        """The norm of x in rows that hold the product's extra columns."""
        wide = x.new_empty(x.shape[0], product.k + product.r)
        rms_norm(x, weight, self.eps, wide[:, : product.k])
        return wide

    def expect(self, saved: Saved) -> None:
        """This layer's backward comes soon: what waits away may begin its way back."""
        if isinstance(saved.gate_up, Parked) and self.offload is not None:
            self.offload.begin_fetch(saved.gate_up)

    def _again(self, saved: Saved) -> torch.Tensor:
        """gate_up, as kept, fetched or made again."""
        if isinstance(saved.gate_up, Parked) and self.offload is not None:
            return self.offload.fetch(saved.gate_up)
        if isinstance(saved.gate_up, torch.Tensor):
            return saved.gate_up
        return self.gate_up.forward(self._normed(saved.h, self.norm_mlp, self.gate_up))

    def _room(self, x: torch.Tensor, product: Product) -> torch.Tensor:
        """Rows for a gradient of the product's output, and the extra columns."""
        return x.new_empty(x.shape[0], product.n + product.r)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views (tokens, heads, width) of queries, keys and values."""
        parts = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.head_width)
        query, key, value = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return query, key, value


def make_block(layer: Any, config: Any, scratch: Scratch, dtype: torch.dtype) -> Block:
    """From a transformers decoder layer, whose weights become views of the block's."""
    attention, mlp = layer.self_attn, layer.mlp
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Block(
        qkv=make_product([attention.q_proj, attention.k_proj, attention.v_proj], scratch, dtype),
        o=make_product([attention.o_proj], scratch, dtype),
        gate_up=make_product([mlp.gate_proj, mlp.up_proj], scratch, dtype),
        down=make_product([mlp.down_proj], scratch, dtype),
        norm_attention=layer.input_layernorm.weight.detach().to(dtype),
        norm_mlp=layer.post_attention_layernorm.weight.detach().to(dtype),
        eps=float(config.rms_norm_eps),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=width,
    )
