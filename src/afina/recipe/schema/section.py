"""What every part of the recipe is: a section of keys with a type, a default and a help text."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
"""A part of a whole."""
Sources = str | list[str]
"""One path or pattern, or several."""


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
