"""The recipe: every key a user may write, its type, its default and its help, one file a section.

A default lives here and nowhere else. `recipe/load.py` reads YAML into these; the JSON Schema in docs/ is generated
from them; the rest of the house takes the parts it needs.
"""

from typing import Annotated, Any

from pydantic import Field

from afina.recipe.schema.chat import Chat
from afina.recipe.schema.data import Data, Mapping
from afina.recipe.schema.export import Export
from afina.recipe.schema.method import Full, Lora, Method, PrefixTuning, PromptTuning
from afina.recipe.schema.model import Model
from afina.recipe.schema.section import Section, Share, Sources, one_line
from afina.recipe.schema.task import Evaluation, Task
from afina.recipe.schema.training import Distill, Training

__all__ = [
    "Chat",
    "Data",
    "Distill",
    "Evaluation",
    "Export",
    "Full",
    "Lora",
    "Mapping",
    "Method",
    "Model",
    "PrefixTuning",
    "PromptTuning",
    "Recipe",
    "Section",
    "Share",
    "Sources",
    "Task",
    "Training",
    "help_texts",
    "one_line",
    "sections",
]


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
    evaluation: Evaluation = Field(default_factory=Evaluation)
    export: Export = Field(default_factory=Export)
    chat: Chat = Field(default_factory=Chat)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain values for YAML or JSON."""
        return self.model_dump(mode="json")


def sections() -> tuple[type[Section], ...]:
    """Every section of the schema, the recipe itself first, in the order they are written."""
    return (
        Recipe,
        Model,
        Data,
        Mapping,
        Lora,
        Full,
        PromptTuning,
        PrefixTuning,
        Training,
        Distill,
        Task,
        Evaluation,
        Export,
        Chat,
    )


def help_texts() -> list[str]:
    """Every sentence of the schema that a user may read, in English: the messages of the catalogues."""
    texts: dict[str, None] = {}
    for section in sections():
        texts[section.purpose()] = None
        texts.update(dict.fromkeys(section.help_of(key) for key in section.model_fields))
    return [text for text in texts if text]
