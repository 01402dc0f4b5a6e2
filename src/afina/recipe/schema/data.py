"""`data`: where the examples lie, and how their rows are read."""

from typing import Annotated, Literal

from pydantic import Field

from afina.recipe.schema.section import Section, Share, Sources


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
    """Files to learn from: paths, folders, patterns such as data/*.jsonl, a bundled set such as afina/sentiment/train,
    or one of the hub such as hub:openai/gsm8k/main/train."""
    validation: Share | Sources = 0.1
    """A share of the training samples, or files of their own; its loss is followed during training."""
    dialect: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text", "mapping"
    ] = "auto"
    """The shape of a row; auto recognises it from the keys of a file's first row and says what it found."""
    mapping: Mapping | None = Field(
        default=None, examples=[{"user": "{{ row.question }}", "assistant": "{{ row.answer }}"}]
    )
    """Needed for rows of a shape of their own."""
    columns: list[str] | None = Field(default=None, examples=[["question", "answer"]])
    """Names of the columns of a CSV or TSV file whose first line does not name them."""
    encoding: list[str] = ["utf-8"]
    """Encodings tried in this order, file by file; what was needed is reported."""
    system: str | None = Field(default=None, examples=["You answer in one word."])
    """A system message put before every conversation that has none."""
    learn: Literal["all", "last", "text"] = "all"
    """What is learnt: all assistant turns, the last one, or the whole text with the user's turns. A message may carry a
    weight of its own."""
    schema_file: str | None = Field(default=None, examples=["schema.json"])
    """A file with a JSON Schema: every answer learnt must be JSON of it. A json task that names none has it too."""
    too_long: Literal["error", "reject"] = "error"
    """What becomes of samples over max_length: stop and list them, or train without them and list them."""
