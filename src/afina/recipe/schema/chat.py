"""`chat`: how answers are sampled."""

from typing import Annotated, Literal

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
    effort: Literal["low", "medium", "high"] | None = Field(default=None, examples=["low"])
    """How long a model that reasons (gpt-oss) thinks before it answers; its template must know reasoning_effort."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] = 512
    """An answer is cut after this many tokens."""
