"""`chat`: how answers are sampled."""

from typing import Annotated

from pydantic import Field

from afina.recipe.schema.section import Section


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
