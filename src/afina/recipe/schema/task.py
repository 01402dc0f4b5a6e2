"""`tasks`: what is asked of the base and of the tuned model, and `evaluation`: of whom else, and when."""

from typing import Annotated, Literal

from pydantic import Field

from afina.recipe.schema.data import Mapping
from afina.recipe.schema.section import Section, Sources

Kind = Literal[
    "classification", "exact", "maths", "json", "code", "similarity", "perplexity", "judge", "forgetting", "lm-eval"
]


class Task(Section):
    """One way of asking how good the model is. Measured on the base, the tuned model, and what was exported of it."""

    name: Annotated[str, Field(examples=["held out"])]
    """How the report calls it."""
    kind: Annotated[Kind, Field(examples=["exact"])]
    """classification: the likeliest of the labels. exact: the text equals the answer. maths: the final number does.
    json: a field does. code: the program passes the tests that stand as the answer. similarity: chrF and ROUGE.
    perplexity: of the answers. judge: another model prefers. forgetting: general questions. lm-eval: benchmarks."""
    data: Sources | None = Field(default=None, examples=["data/test.jsonl"])
    """Held-out samples; forgetting and lm-eval bring their own."""
    mapping: Mapping | None = Field(
        default=None, examples=[{"user": "{{ row.question }}", "assistant": "{{ row.answer }}"}]
    )
    """How rows of this task's data become questions and reference answers; unset: as those of data.train."""
    labels: list[str] | None = Field(default=None, examples=[["positiva", "negativa"]])
    """classification: what may be answered; unset: the answers found in data."""
    decide: Literal["likelihood", "constrained"] = "likelihood"
    """classification: the label with the likeliest tokens on average, or writing that can only become a label."""
    normalise: bool = False
    """exact: case, accents, punctuation and spaces do not count."""
    numbers: Literal["auto", "en", "es"] = "auto"
    """maths: how 1.234,5 is read; auto takes an answer that is right in either convention."""
    field: str | None = Field(default=None, examples=["intent"])
    """json: the top-level field that must equal the reference's; unset: the whole object must. similarity: the field
    whose text is compared; unset: the whole answer is."""
    schema_file: str | None = Field(default=None, examples=["schema.json"])
    """json: a JSON Schema that every answer should satisfy: a file beside the recipe, or of a bundled set, as
    afina/bot-configurator/schema.json."""
    constrained: bool = False
    """json: the model can write nothing else than JSON, of the schema where there is one."""
    attempts: Annotated[int, Field(ge=1, le=1000)] = 1
    """code: programs written for each question; pass@k is told for 1 and for all of them."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """code: how freely the attempts differ."""
    seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """code: how long a program may run."""
    judge: str | None = Field(default=None, examples=["http://127.0.0.1:8000/v1#my-judge"])
    """judge: who judges: an OpenAI-compatible endpoint as URL#model, a model folder, a hub name or a GGUF file."""
    key_variable: str | None = Field(default=None, examples=["OPENAI_API_KEY"])
    """judge: the environment variable with the endpoint's key; the key itself never stands in a recipe."""
    criteria: str | None = Field(default=None, examples=["Which answer explains better?"])
    """judge: what to judge by."""
    benchmarks: list[str] | None = Field(default=None, examples=[["arc_easy", "hellaswag"]])
    """lm-eval: its tasks or groups by name, or YAML files of tasks, which may run no code. Needs the package lm-eval;
    most of its data sets come from the hub."""
    fewshot: Annotated[int, Field(ge=0, le=100)] | None = None
    """lm-eval: worked examples before each question; unset: as the task says."""
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, examples=[200])
    """Ask only this many samples, chosen by the seed."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] = 128
    """A written answer is cut after this many tokens."""


KEYS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("data", "mapping", "labels", "decide"),
    "exact": ("data", "mapping", "normalise"),
    "maths": ("data", "mapping", "numbers"),
    "json": ("data", "mapping", "field", "schema_file", "constrained"),
    "code": ("data", "mapping", "attempts", "temperature", "seconds"),
    "similarity": ("data", "mapping", "field"),
    "perplexity": ("data", "mapping"),
    "judge": ("data", "mapping", "judge", "key_variable", "criteria"),
    "forgetting": (),
    "lm-eval": ("benchmarks", "fewshot"),
}
"""The keys that a kind of task reads beside name, kind, limit and max_new_tokens."""


class Evaluation(Section):
    """Who is asked the tasks."""

    systems: list[str] = ["base", "tuned", "exports"]
    """base, tuned, exports (every GGUF file of the run), or others: a model folder, a hub name, a GGUF file, a run
    folder, or an OpenAI-compatible endpoint as URL#model."""
    minutes: Annotated[float, Field(gt=0, le=100_000)] | None = Field(default=None, examples=[30.0])
    """Stop asking after so long; all are then compared on the samples that all have answered."""
    key_variable: str | None = Field(default=None, examples=["OPENAI_API_KEY"])
    """The environment variable with an endpoint's key."""
