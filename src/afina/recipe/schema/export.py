"""`export`: what leaves the house."""

from typing import Literal

from afina.recipe.schema.section import Section


class Export(Section):
    """What leaves the house."""

    formats: list[
        Literal[
            "merged",
            "nf4",
            "f32",
            "f16",
            "bf16",
            "q8_0",
            "q6_k",
            "q5_k_m",
            "q5_k_s",
            "q5_1",
            "q5_0",
            "q4_k_m",
            "q4_k_s",
            "q4_1",
            "q4_0",
            "iq4_xs",
            "mxfp4",
            "q3_k_l",
            "q3_k_m",
            "q3_k_s",
            "q2_k",
            "q2_k_s",
            "lora",
            "ollama",
            "lmstudio",
        ]
    ] = ["q8_0"]
    """merged: a folder for transformers; nf4: one in 4 bits, for bitsandbytes. ollama: a Modelfile, lmstudio: a folder,
    both around the first GGUF file. lora: the adapter alone as GGUF. The rest: GGUF files for llama.cpp, the more bits
    the nearer to the model."""
    imatrix: bool = False
    """Measure on training samples which columns of each matrix matter, and round those best. Helps below 5 bits."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How the merged model is written, from which GGUF files are made. The 16 bits take half the disk and round."""
