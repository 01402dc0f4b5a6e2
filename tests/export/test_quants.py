"""Blocks of few bits: what is stored is what was meant, as near as a search gets, and mixed as llama.cpp mixes it."""

import gguf
import numpy as np
import pytest
import torch

from afina.export import rounding
from afina.export.mixes import FORMATS, PLAIN, Mix
from afina.export.quants import BLOCKS, encode
from afina.export.rounding import fields

KINDS = [kind for kind in BLOCKS if kind != "q8_0"]
SCALES = {"normal": 0.02, "tiny": 1e-7, "large": 300.0}


def weights(rows: int = 24, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """Heavy tails, a few outliers, a row of zeros, a constant row, a row of one sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 0.02
    x *= torch.rand(rows, 1, generator=generator) + 0.5
    x[0], x[1], x[2] = 0, 0.03, x[2].abs()
    x[3] = -x[3].abs()
    x[4, ::97] = 0.5
    x[5, 1:] = 0
    return x


def read(stored: torch.Tensor, kind: str) -> np.ndarray:
    """What llama.cpp will see, by the gguf package's reader."""
    return gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind.upper()])


def rmse(kind: str, x: torch.Tensor, cost: torch.Tensor | float = 1.0) -> float:
    error = torch.from_numpy(read(encode(x, kind), kind)) - x
    return float((cost * error.square()).mean().sqrt() / (cost * x.square()).mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_stored_bits_say_what_was_meant(kind: str, scale: float) -> None:
    x = weights() * (scale / 0.02)
    block, size = BLOCKS[kind]
    assert (block, size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    stored = encode(x, kind)
    assert stored.shape == (24, 512 // block * size) and stored.dtype == torch.uint8
    meant = fields(x.reshape(-1, block), kind).values().reshape(x.shape).numpy()
    assert np.array_equal(read(stored, kind), meant)
    assert not read(stored, kind)[0].any()  # zeros stay zeros


@pytest.mark.parametrize("scale", [*SCALES.values(), 1e-30])
def test_eight_bits_are_ggmls_to_the_byte(scale: float) -> None:
    x = weights() * (scale / 0.02)
    x[6] = torch.arange(512) % 255 - 127 + 0.5  # halves
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encode(x, "q8_0").numpy(), theirs)


# Errors of llama.cpp's own search (ggml_quantize_chunk of llama-cpp-python 0.3.36) on the first 256 rows of 2048
# normal values of seed 0, relative to their size. benchmarks/quantize.py measures both side by side.
REFERENCE = {
    "q2_k": 0.29687,
    "q3_k": 0.15074,
    "q4_k": 0.07142,
    "q5_k": 0.03608,
    "q6_k": 0.01771,
    "iq4_nl": 0.07609,
    "iq4_xs": 0.07669,
}


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_no_larger_than_llamacpps(kind: str) -> None:
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    assert rmse(kind, x) <= 1.01 * REFERENCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_search_beats_the_plain_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales from the largest weight alone, nothing tried: what the search must beat."""
    if not kind.startswith("q"):
        pytest.skip("the table has no plain way")
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    searched = rmse(kind, x)
    monkeypatch.setitem(rounding.STEPS, kind, (0.0,))
    monkeypatch.setattr(rounding, "REFINED", 0)
    assert searched < 0.995 * rmse(kind, x)


@pytest.mark.parametrize("kind", KINDS)
def test_important_columns_are_kept_better(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(128, 512, generator=generator)
    importance = torch.exp(2 * torch.randn(512, generator=generator))
    plain, steered = (
        float((importance * (torch.from_numpy(read(encode(x, kind, given), kind)) - x).square()).sum())
        for given in (None, importance)
    )
    assert steered < 0.93 * plain


def test_rows_do_not_know_their_neighbours() -> None:
    """Encoded alone or among others a row is the same, but for sums that end in another last digit."""
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(3))
    for kind in KINDS:
        whole, alone = encode(x, kind), torch.cat([encode(row[None], kind) for row in x])
        assert float((whole == alone).float().mean()) > 0.995, kind
        assert np.abs(read(whole, kind) - read(alone, kind)).mean() < 1e-3, kind
    with pytest.raises(ValueError, match="multiple"):
        encode(x[:, :100], "q4_k")


# ---------------------------------------------------------------- mixes

LETTERS = {"q2_k": "2", "q3_k": "3", "q4_k": "4", "q5_k": "5", "q6_k": "6", "q8_0": "8", "iq4_xs": "x"}
# Recorded from llama.cpp's quantiser (llama-cpp-python 0.3.36) on a Llama of 17 layers, 8 heads over 2: format to
# head, embeddings, attn_output, attn_k, then attn_v and ffn_down layer by layer.
RECORDED = {
    "q8_0": "8888 88888888888888888 88888888888888888",
    "q6_k": "6666 66666666666666666 66666666666666666",
    "q5_k_m": "6555 66556556556556666 66556556556556666",
    "q5_k_s": "6555 55555555555555555 55555555555555555",
    "q4_k_m": "6444 66446446446446666 66446446446446666",
    "q4_k_s": "6444 55554444444444444 55444444444444444",
    "iq4_xs": "6xxx 55555555555555555 55xxxxxxxxxxxxxxx",
    "q3_k_l": "6353 55555555555555555 55555555555555555",
    "q3_k_m": "6343 55444444444444444 54444444444444444",
    "q3_k_s": "6333 33333333333333333 33333333333333333",
    "q2_k": "6232 44444444444444444 33333333333333333",
}


@pytest.mark.parametrize("name", RECORDED)
def test_mixes_are_llamacpps(name: str) -> None:
    mix = Mix(name, layers=17, heads=8, kv_heads=2, tied=False)
    assert seen(mix) == RECORDED[name]


def seen(mix: Mix) -> str:
    def kind(tensor: str) -> str:
        return LETTERS[mix.choose(f"{tensor}.weight", 256)[0]]

    single = [kind(tensor) for tensor in ("output", "token_embd", "blk.9.attn_output", "blk.9.attn_k")]
    rows = ["".join(kind(f"blk.{layer}.{role}") for layer in range(17)) for role in ("attn_v", "ffn_down")]
    return " ".join(["".join(single), *rows])


def test_mixes_where_rows_do_not_divide() -> None:
    def chosen(name: str, tensor: str, columns: int, **changes: object) -> tuple[str, str]:
        counts = dict(layers=8, heads=8, kv_heads=8, tied=True) | changes
        return Mix(name, **counts).choose(f"{tensor}.weight", columns)  # type: ignore[arg-type]

    assert chosen("q4_k_m", "token_embd", 256) == ("q6_k", "q6_k")  # a tied head
    assert chosen("q4_k_m", "token_embd", 256, tied=False) == ("q4_k", "q4_k")
    assert chosen("q4_k_m", "token_embd", 64) == ("q8_0", "q8_0")
    assert chosen("q4_k_m", "blk.3.attn_q", 64) == ("q5_0", "q4_k")
    assert chosen("q4_k_m", "blk.3.attn_q", 172) == ("f16", "q4_k")
    assert chosen("iq4_xs", "blk.3.attn_q", 64) == ("iq4_nl", "iq4_xs")
    assert chosen("q2_k", "blk.3.attn_q", 64) == ("q4_0", "q2_k")
    assert chosen("q3_k_l", "blk.3.ffn_down", 96) == ("q5_1", "q5_k")
    assert chosen("q6_k", "blk.3.ffn_down", 96) == ("q8_0", "q6_k")
    assert chosen("q8_0", "blk.3.ffn_down", 172) == ("f16", "q8_0")
    assert chosen("q4_k_m", "blk.3.attn_qkv", 256, layers=32) == ("q6_k", "q6_k")  # fused: as the values
    assert chosen("q4_k_m", "blk.11.attn_v", 256, layers=80, kv_heads=1) == ("q5_k", "q5_k")  # 70B: one for eight
    assert chosen("q4_0", "blk.0.ffn_down", 256, importance=True) == ("q4_1", "q4_1")
    assert all(chosen(name, "output", 256)[0] == FORMATS[name][0] for name in PLAIN)
