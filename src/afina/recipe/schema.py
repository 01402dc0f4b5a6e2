"""The recipe: every key a user may write, its type, its default and its help, in this one place.

A default lives here and nowhere else. `recipe/load.py` reads YAML into these; the JSON Schema in docs/ is generated
from them; the rest of the house takes the parts it needs.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Share = Annotated[float, Field(ge=0, lt=1)]
Sources = str | list[str]


class Section(BaseModel):
    """One mapping of the recipe: unknown keys are errors, values are never coerced between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )

    @classmethod
    def help_of(cls, key: str) -> str:
        """The help of one key, in English and on one line: what `_()` translates at run time."""
        return one_line(cls.model_fields[key].description)

    @classmethod
    def purpose(cls) -> str:
        """What the section is for, in English and on one line."""
        return one_line(cls.__doc__)


def one_line(text: str | None) -> str:
    """A docstring without its line ends."""
    return " ".join((text or "").split())


class Model(Section):
    """The base model and how it is held."""

    base: str = "afina/tiny"
    """What is fine-tuned: a model folder, a hub name such as Qwen/Qwen3-0.6B, or the bundled afina/tiny."""
    max_length: Annotated[int, Field(ge=8, le=2**24)] = 1024
    """The context in tokens; a sample that is longer is rejected by name, never cut silently."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the frozen weights and the arithmetic; auto takes bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs."""
    chat_template: str | None = Field(default=None, examples=["afina/chatml"])
    """A Jinja file to use instead of the model's own template; needed for a base that has none. `afina/chatml`,
    `afina/alpaca` and `afina/plain` are bundled."""
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of a hub model."""


class Mapping(Section):
    """How rows of a shape of their own become conversations. Each value is a Jinja template over `row`."""

    rows: str = ""
    """Where the rows lie in a JSON document: keys joined by dots, `*` for any key; what `*` matched is in `keys`."""
    system: str | None = Field(default=None, examples=["You answer in one word."])
    """Template of the system message."""
    user: Annotated[str, Field(examples=["{{ row.question }}"])]
    """Template of what the user says, such as `{{ row.question }}`."""
    assistant: Annotated[str, Field(examples=["{{ row.answer }}"])]
    """Template of the answer to be learnt, such as `{{ row.answer }}`."""


class Data(Section):
    """The examples."""

    train: Annotated[Sources, Field(examples=["data/train.jsonl"])]
    """Files to learn from: paths, patterns such as data/*.jsonl, or a bundled set such as afina/sentiment/train."""
    validation: Share | Sources = 0.1
    """A share of the training samples, or files of their own; its loss is followed during training."""
    dialect: Literal["auto", "messages", "alpaca", "mapping"] = "auto"
    """The shape of a row; auto recognises it from the keys of the first row and says what it found."""
    mapping: Mapping | None = Field(
        default=None, examples=[{"user": "{{ row.question }}", "assistant": "{{ row.answer }}"}]
    )
    """Needed for rows that are neither chat messages nor Alpaca."""
    encoding: list[str] = ["utf-8"]
    """Encodings tried in this order, file by file; what was needed is reported."""
    system: str | None = Field(default=None, examples=["You answer in one word."])
    """A system message put before every conversation that has none."""
    learn: Literal["all", "last"] = "all"
    """Which assistant turns are learnt."""
    too_long: Literal["error", "reject"] = "error"
    """What becomes of samples over max_length: stop and list them, or train without them and list them."""


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


class Training(Section):
    """The optimisation."""

    epochs: Annotated[float, Field(gt=0, le=100_000)] = 3.0
    """Times every sample is seen."""
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = Field(default=None, examples=[1000])
    """Stop after this many optimiser steps instead."""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 16
    """Samples per optimiser step. How they are cut into micro-batches changes memory and speed, never the result."""
    packing: bool = True
    """Lay samples end to end without padding; attention stays inside each sample."""
    micro_batch_tokens: Annotated[int, Field(ge=8, le=2**28)] | None = Field(default=None, examples=[4096])
    """Tokens computed at once, padding included; unset: 4096, on a GPU 16384, and never less than max_length."""
    engine: Literal["auto", "reference"] = "auto"
    """auto: fused blocks, where they cover the model and prove themselves on the first batch; reference: transformers
    and PEFT as they are."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and linear end at zero."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, from 1 a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices only (Loshchilov & Hutter, 2017, arXiv:1711.05101)."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay rates of the first and second moment."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    validations: Annotated[int, Field(ge=0, le=10_000)] = 4
    """How many times the validation loss is measured, the last time after the last step."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10_000)] | None = Field(default=None, examples=[5.0])
    """Minutes between two checkpoints; unset: so many that saving costs 1% of the time at most, and 10 at most."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """The newest checkpoints that are kept while training; a finished run needs none."""


class Task(Section):
    """One way of asking how good the model is. Measured on the base and on the tuned model."""

    name: Annotated[str, Field(examples=["held out"])]
    """How the report calls it."""
    kind: Annotated[Literal["classification", "exact", "json"], Field(examples=["exact"])]
    """classification: the likeliest of the labels. exact: the generated text equals the answer. json: a field does."""
    data: Annotated[Sources, Field(examples=["data/test.jsonl"])]
    """Held-out samples, read as data.train is."""
    labels: list[str] | None = Field(default=None, examples=[["positiva", "negativa"]])
    """classification: what may be answered; unset: the answers found in data."""
    field: str | None = Field(default=None, examples=["intent"])
    """json: the top-level field that must equal the reference's; unset: the whole object must."""
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, examples=[200])
    """Ask only this many samples, chosen by the seed."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] = 128
    """exact and json: the answer is cut after this many tokens."""


class Export(Section):
    """What leaves the house."""

    formats: list[
        Literal[
            "merged",
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
    """merged: a folder for transformers. ollama: a Modelfile, lmstudio: a folder, both around the first GGUF file.
    lora: the adapter alone as GGUF. The rest: GGUF files for llama.cpp, the more bits the nearer to the model."""
    imatrix: bool = False
    """Measure on training samples which columns of each matrix matter, and round those best. Helps below 5 bits."""


class Chat(Section):
    """How answers are sampled when talking to the model."""

    system: str | None = Field(default=None, examples=["You answer in one word."])
    """The system message."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 always takes the likeliest token; 0.3 to 0.5 suits maths."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] = 512
    """An answer is cut after this many tokens."""


class Recipe(Section):
    """One experiment, from data to files that answer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", examples=["my-first-tune"])]
    """Names the run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the split, the order of samples, the adapters' start and dropout."""
    model: Model = Field(default_factory=Model)
    data: Data
    method: Method = Field(default_factory=Lora)
    training: Training = Field(default_factory=Training)
    tasks: list[Task] = []
    export: Export = Field(default_factory=Export)
    chat: Chat = Field(default_factory=Chat)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain values for YAML or JSON."""
        return self.model_dump(mode="json")


def sections() -> tuple[type[Section], ...]:
    """Every section of the schema, the recipe itself first, in the order they are written."""
    return (Recipe, Model, Data, Mapping, Lora, Full, Training, Task, Export, Chat)


def help_texts() -> list[str]:
    """Every sentence of the schema that a user may read, in English: the messages of the catalogues."""
    texts: dict[str, None] = {}
    for section in sections():
        texts[section.purpose()] = None
        texts.update(dict.fromkeys(section.help_of(key) for key in section.model_fields))
    return [text for text in texts if text]
