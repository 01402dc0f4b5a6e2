"""`training`: how it learns."""

from typing import Annotated, Literal

from pydantic import Field

from afina.recipe.schema.section import Section, Share


class Distill(Section):
    """A teacher: the student learns its whole distribution too (Hinton et al., 2015, arXiv:1503.02531)."""

    teacher: Annotated[str, Field(examples=["runs/large"])]
    """Who teaches: a run folder, a model folder, a GGUF file or a hub name, with the very tokens of the student."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Both distributions are softened by this: the higher, the more the unlikely tokens count."""
    alpha: Share = 0.5
    """The share of the plain loss on the answers; the rest is temperature squared times the divergence."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), which covers all that the teacher may say; reverse: KL(student || teacher),
    which keeps to what it would say."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How a teacher that is no run is held."""


class Training(Section):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0, le=100_000)] = 3.0
    """Times every sample is seen."""
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = Field(default=None, examples=[1000])
    """Stop after this many optimiser steps instead."""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 16
    """Samples per optimiser step. How they are cut into micro-batches changes memory and speed, never the result."""
    batch_tokens: Annotated[int, Field(ge=1, le=2**30)] | None = Field(default=None, examples=[32768])
    """Tokens per optimiser step instead: samples are dealt out until the next would exceed this."""
    packing: bool = True
    """Lay samples end to end without padding; attention stays inside each sample."""
    micro_batch_tokens: Annotated[int, Field(ge=8, le=2**28)] | None = Field(default=None, examples=[4096])
    """Tokens computed at once, padding included; unset: 4096, on a GPU 16384, and never less than max_length."""
    engine: Literal["auto", "reference"] = "auto"
    """auto: fused blocks, where they cover the model and prove themselves on the first batch; reference: transformers
    and PEFT as they are."""
    exact: bool = True
    """On a GPU: sum in an order that does not change, so that the same recipe gives the same bits, and a run that was
    stopped ends as the one that was not. Costs a few percent of the time."""
    products: Literal["exact", "8bit", "fp8", "int8"] = "exact"
    """What the fused engine multiplies frozen weights in: exact, in the precision; 8bit, in eight bits both ways, which
    is fp8 (e4m3) where the GPU has it (Ada, Hopper, Blackwell), else int8 (Turing, Ampere). Faster, in less memory, and
    a few percent of noise on every product; it proves itself on the first batch, else exact products train. Experts of
    a mixture are held so, and multiplied exactly."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again going back: less memory, a third more time. For the
    reference; the fused engine chooses by itself what it keeps."""
    distill: Distill | None = Field(default=None, examples=[{"teacher": "runs/large", "temperature": 2.0}])
    """Learn from a larger model too. The validation loss stays the plain one. The reference engine does it."""
    neftune_alpha: Annotated[float, Field(gt=0, le=1000)] | None = Field(default=None, examples=[5.0])
    """Noise of this size is added to the tokens' embeddings while training (NEFTune, arXiv:2310.05914)."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "muon", "adafactor", "lion"] = "adamw"
    """8bit: moments in eight bits, by bitsandbytes; paged: they move to the computer's memory when the GPU's is short.
    muon: for full fine-tuning, hidden matrices only, the rest by adamw. lion wants a learning rate 3 to 10 times
    smaller."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and linear end at zero."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, from 1 a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices only (Loshchilov & Hutter, 2017, arXiv:1711.05101)."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = Field(
        default=None, examples=[[0.9, 0.999]]
    )
    """Decay rates of the optimiser's first and second moment; unset: 0.9 and 0.999, of lion 0.9 and 0.99."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    validations: Annotated[int, Field(ge=0, le=10_000)] = 4
    """How many times the validation loss is measured, the last time after the last step."""
    evaluate: list[str] = Field(default=[], examples=[["held out"]])
    """Tasks that are asked of the model while it trains too, by their names under tasks. Their figures stand in
    metrics.jsonl, the curves and the report; what is learnt stays the same to the bit."""
    evaluations: Annotated[int, Field(ge=1, le=10_000)] = 4
    """How many times these tasks are asked, the last time after the last step."""
    evaluate_samples: Annotated[int, Field(ge=1, le=10**6)] = 64
    """Of each of these tasks so many samples are asked at most, the same every time, chosen by the seed."""
    keep: Literal["best", "last"] = "best"
    """Which weights the finished run holds: the last; or those with the lowest validation loss measured, where the
    later ones are worse by more than chance."""
    best_by: str | None = Field(default=None, examples=["held out"])
    """The task of evaluate whose main figure says which weights are best; unset: the validation loss."""
    early_stop: bool = True
    """End the run where it plainly overfits or diverges: its validation loss rose twice in a row, by a tenth in all."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10_000)] | None = Field(default=None, examples=[5.0])
    """Minutes between two checkpoints; unset: so many that saving costs 1% of the time at most, and 10 at most."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """The newest checkpoints that are kept while training; a finished run needs none."""
