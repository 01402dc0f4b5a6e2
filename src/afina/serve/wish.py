"""What is wished of a server, whoever's protocol it came by, and how the answer is told.

Knows neither HTTP nor models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from afina.data.conversation import Message
from afina.errors import AfinaError
from afina.language import _
from afina.recipe.schema import Chat


class Refusal(AfinaError):
    """A request that gets no answer. `status` is HTTP's, `param` the part of the request, `code` OpenAI's word."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Wish:
    """A conversation to be answered, or bare `texts` (or ids) to be gone on with; `count` answers to each.

    What is None is as the model's recipe says. `top`: of how many tokens beside each the likelihood is told. `schema`:
    a JSON Schema as text that answers must fit.
    """

    model: str
    messages: tuple[Message, ...] = ()
    texts: tuple[str | tuple[int, ...], ...] = ()
    count: int = 1
    room: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top: int | None = None
    schema: str | None = None
    effort: str | None = None

    @property
    def answers(self) -> int:
        """How many there will be."""
        return self.count * max(1, len(self.texts))

    def settings(self, said: Chat) -> Chat:
        """The chat settings of a model's recipe, with what the wish says in their place. Raises Refusal."""
        mine = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.room,
            "effort": self.effort,
        }
        return said.model_copy(update={key: value for key, value in mine.items() if value is not None})

    def conversation(self, said: Chat) -> list[Message]:
        """The messages, and before them the recipe's system message where they have none."""
        own = any(message.role in ("system", "developer") for message in self.messages)
        return [*([] if own or not said.system else [Message("system", said.system)]), *self.messages]


@dataclass(frozen=True)
class Said:
    """A token as it is told with its likelihood: text, natural log-probability, and the likeliest ones in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer; `tokens` where likelihoods were asked for."""

    text: str
    tokens: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Over:
    """An answer is whole. `cut`: it was not ended by the model or a stop text. `tokens`: written, the end included."""

    cut: bool
    tokens: int


Hear = Callable[[int, Piece | Over | AfinaError], None]
"""Is told, by another thread, what comes of answer number i; Over or an error comes last, once."""


@dataclass(frozen=True)
class Ticket:
    """A wish that was taken: tokens of its prompts, and how to want it no more."""

    tokens: int
    cancel: Callable[[], None]


class Desk(Protocol):
    """Where wishes are answered."""

    @property
    def models(self) -> tuple[str, ...]:
        """Whom one can ask."""
        ...

    @property
    def limit(self) -> int:
        """The context in tokens."""
        ...

    def take(self, wish: Wish, hear: Hear) -> Ticket:
        """Begin to answer; may take a second. Raises AfinaError for what cannot be answered."""
        ...

    def stop(self, seconds: float) -> None:
        """Take no more; who waits is told so at once, who is being answered after so many seconds. Returns at once."""
        ...


def room_for(length: int, settings: Chat, limit: int) -> int:
    """Tokens an answer may get after a prompt of so many. Raises Refusal where there is none."""
    if length >= limit:
        raise Refusal(
            _("The prompt is {length} tokens long; the context is {limit}, answer included.").format(
                length=length, limit=limit
            ),
            param="messages",
            code="context_length_exceeded",
            hint=_("Shorten the conversation."),
        )
    return min(settings.max_new_tokens, limit - length)


def check_prompt(prompt: str | tuple[int, ...], size: int) -> None:
    """Raises Refusal for a bare prompt that is empty, or holds ids that are none of a vocabulary of this size."""
    if not prompt or (not isinstance(prompt, str) and not all(0 <= index < size for index in prompt)):
        raise Refusal(
            _("A prompt is a text, or a list of token ids below {size}, and not empty.").format(size=size),
            param="prompt",
        )


def unknown(name: str, models: tuple[str, ...]) -> Refusal:
    """Nobody is called so."""
    return Refusal(
        _("There is no model called {name}.").format(name=repr(name)[:80]),
        status=404,
        param="model",
        code="model_not_found",
        hint=_("There are {names}.").format(names=", ".join(models)),
    )


def stopping() -> Refusal:
    """What is said to whoever cannot be answered to the end."""
    return Refusal(_("The server is being stopped."), status=503, code="stopping")
