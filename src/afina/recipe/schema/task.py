"""`tasks`: what is asked of the base and of the tuned model."""

from typing import Annotated, Literal

from pydantic import Field

from afina.recipe.schema.section import Section, Sources


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
