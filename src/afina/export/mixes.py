"""Which tensor of a GGUF file is stored in which type: the formats, as llama.cpp mixes them.

A format such as q4_k_m names what most matrices get. A few that matter more get more bits: the values of attention,
the way down of the MLP, the head, in some layers or all. The rules are llama.cpp's (its llama-quant.cpp, read as a
specification), so that a file means here what it means there. Knows names and counts, nothing of weights.
"""

import re
from dataclasses import dataclass

FORMATS: dict[str, tuple[str, str]] = {
    "f32": ("f32", "ALL_F32"),
    "f16": ("f16", "MOSTLY_F16"),
    "bf16": ("bf16", "MOSTLY_BF16"),
    "q8_0": ("q8_0", "MOSTLY_Q8_0"),
    "q6_k": ("q6_k", "MOSTLY_Q6_K"),
    "q5_k_m": ("q5_k", "MOSTLY_Q5_K_M"),
    "q5_k_s": ("q5_k", "MOSTLY_Q5_K_S"),
    "q5_1": ("q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("q5_0", "MOSTLY_Q5_0"),
    "q4_k_m": ("q4_k", "MOSTLY_Q4_K_M"),
    "q4_k_s": ("q4_k", "MOSTLY_Q4_K_S"),
    "q4_1": ("q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("q4_0", "MOSTLY_Q4_0"),
    "iq4_xs": ("iq4_xs", "MOSTLY_IQ4_XS"),
    "mxfp4": ("mxfp4", "MOSTLY_MXFP4_MOE"),
    "q3_k_l": ("q3_k", "MOSTLY_Q3_K_L"),
    "q3_k_m": ("q3_k", "MOSTLY_Q3_K_M"),
    "q3_k_s": ("q3_k", "MOSTLY_Q3_K_S"),
    "q2_k": ("q2_k", "MOSTLY_Q2_K"),
    "q2_k_s": ("q2_k", "MOSTLY_Q2_K_S"),
}
"""Format: the type of most matrices, and the file type as llama.cpp numbers it."""
EXPORTS = ("merged", "nf4", *FORMATS, "lora", "ollama", "lmstudio")
"""Everything that a run can be exported to; what is no format of GGUF is made from one, or is no GGUF."""
PLAIN = ("f32", "f16", "bf16")
"""Formats that quantise nothing."""
BLOCK = {"f32": 1, "f16": 1, "bf16": 1} | dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "iq4_nl"), 32)
"""Weights in a block; the other types have 256."""
NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
"""What a matrix gets whose rows do not divide by 256."""
BY_IMPORTANCE = {"q4_0": "q4_1", "q5_0": "q5_1"}


@dataclass(frozen=True)
class Mix:
    """What the choice depends on besides a tensor's name: the format, the model's counts, whether the head is tied,
    whether an importance matrix is used."""

    format: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    importance: bool = False

    def choose(self, name: str, columns: int) -> tuple[str, str]:
        """The type a matrix gets, and the type it was meant to have; they differ where its rows do not divide."""
        meant = self._meant(name, columns)
        chosen = meant
        if columns % BLOCK.get(chosen, 256):
            chosen = NARROWER.get(meant, meant)
        if columns % BLOCK.get(chosen, 256):
            chosen = "f16"
        return chosen, meant

    def _meant(self, name: str, columns: int) -> str:
        usual = FORMATS[self.format][0]
        if self.format in PLAIN:
            return usual
        role = name.removesuffix(".weight").rpartition(".")[2]
        if role == "output" or (role == "token_embd" and self.tied):
            if self.format == "mxfp4" or usual == "q8_0" or columns % BLOCK.get(usual, 256):
                return "q8_0"
            return "q6_k"
        if self.format == "mxfp4":  # llama.cpp has it for experts; here the MLP is in their place
            return "mxfp4" if role.startswith("ffn_") else "q8_0"
        role = role.removesuffix("_exps")
        found = re.match(r"blk\.(\d+)\.", name)
        layer = int(found.group(1)) if found else 0
        match role:
            case "attn_v" | "attn_qkv":
                return self._values(layer) or usual
            case "ffn_down":
                return self._down(layer) or usual
            case "attn_output":
                return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.format, usual)
        return usual

    def _values(self, layer: int) -> str | None:
        """Several heads of queries share these weights: they are few, and each counts often."""
        shared = self.heads >= 4 * self.kv_heads
        chosen: str | None = None
        match self.format:
            case "q2_k":
                chosen = "q4_k" if shared else "q3_k"
            case "q2_k_s" if shared:
                chosen = "q4_k"
            case "q3_k_m":
                chosen = "q5_k" if layer < 2 else "q4_k"
            case "q3_k_l":
                chosen = "q5_k"
            case "iq4_xs" if shared:
                chosen = "q5_k"
            case "q4_k_m" | "q5_k_m" if self._favoured(layer):
                chosen = "q6_k"
            case "q4_k_s" if layer < 4:
                chosen = "q5_k"
        if self.layers == 80 and self.heads > self.kv_heads and (chosen or FORMATS[self.format][0]) in ("q3_k", "q4_k"):
            return "q5_k"
        return chosen

    def _down(self, layer: int) -> str | None:
        first = layer < self.layers // 8
        match self.format:
            case "q2_k":
                return "q3_k"
            case "q2_k_s" if first:
                return "q4_k"
            case "q3_k_m":
                return "q5_k" if layer < self.layers // 16 else "q4_k"
            case "q3_k_l":
                return "q5_k"
            case "q4_k_m" | "q5_k_m" if self._favoured(layer):
                return "q6_k"
            case "iq4_xs" if first and not self.importance:
                return "q5_k"
            case "q4_k_s" if first:
                return "q5_k"
            case "q4_0" | "q5_0" if first and self.importance:
                return BY_IMPORTANCE[self.format]
        return None

    def _favoured(self, layer: int) -> bool:
        """The first and last eighth of the layers, and every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
