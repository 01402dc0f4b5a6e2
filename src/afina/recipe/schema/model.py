"""`model`: the base, and how it is held."""

from typing import Annotated, Literal

from pydantic import Field

from afina.recipe.schema.section import Section


class Model(Section):
    """The base model and how it is held."""

    base: str = "afina/tiny"
    """What is fine-tuned: a model folder, a GGUF file, a hub name such as Qwen/Qwen3-0.6B, or afina/tiny."""
    max_length: Annotated[int, Field(ge=8, le=2**24)] = 1024
    """The context in tokens; a sample that is longer is rejected by name, never cut silently."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the frozen weights and the arithmetic; auto takes bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How a base's linear layers are held: nf4 (four bits, QLoRA), fp4 or int8, by bitsandbytes (pip install
    "afina[qlora]"). A checkpoint that is saved so is recognised by itself."""
    double_quantization: bool = True
    """nf4 and fp4: hold the scales of the blocks in eight bits too, 0.4 bits a weight less."""
    experts: Literal["packed", "unpacked"] = "packed"
    """How experts are held that a checkpoint has in MXFP4 (gpt-oss): packed as they are, four bits a weight, or
    unpacked to the precision, which takes four times the memory. The fused engine unpacks packed ones layer by layer,
    and as many for good as there is room for."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs."""
    chat_template: str | None = Field(default=None, examples=["afina/chatml"])
    """A Jinja file to use instead of the model's own template; needed for a base that has none. `afina/chatml`,
    `afina/alpaca` and `afina/plain` are bundled."""
    turn_tokens: list[str] = Field(default=[], examples=[["<|turn|>"]])
    """Control tokens of a template of your own: those that the vocabulary lacks are added, and all of them learn."""
    adapter: str | None = Field(default=None, examples=["runs/first/adapter"])
    """Start a new run from this LoRA adapter: a finished run's folder, or one in PEFT's format, of the same base, rank
    and alpha. To go on with a run that was stopped, give its command again instead."""
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of a hub model."""
