"""What can be asked of a system, and what it answers. Knows no model and no task."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from afina.data.conversation import Message
from afina.language import _

FORMAT = 1
"""Part of every key of the store of answers: raised when an answer would come out differently."""


@dataclass(frozen=True)
class Constraint:
    """What a written answer can only be: one of `choices`, or JSON (of `schema`, where it is given)."""

    choices: tuple[str, ...] = ()
    schema: str | None = None
    """A JSON Schema as text; "{}" for any JSON object."""


@dataclass(frozen=True)
class Write:
    """Continue the conversation with an answer."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    constraint: Constraint | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Choose:
    """Which of `labels` is the likeliest answer, end of turn included, on average over its tokens."""

    messages: tuple[Message, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """How likely `answer` is as the answer."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Continue:
    """Go on with a bare text, no conversation, until one of `until` is written."""

    text: str
    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Weigh:
    """How likely `continuation` is after a bare text, and whether it is what the model itself would write."""

    text: str
    continuation: str


Request = Write | Choose | Read | Continue | Weigh


@dataclass(frozen=True)
class Answer:
    """What came back. `text`: written or chosen. `tokens`: written, or judged. `ended`: the end of turn came.

    `scores`: Choose: mean log-probability a token of each label; Read: [sum of log-probabilities of the tokens];
    Weigh: that sum, and 1 where each token was the likeliest, else 0.
    `error`: why there is no answer; such answers are not remembered.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = True
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)
    error: str = ""

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Sink = Callable[[int, Answer], None]
"""Is given the place of a request, once, and its answer."""


class Answering(Protocol):
    """A system that is open."""

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        """Answer all of them, in any order. What cannot be answered gets an Answer with an error."""
        ...


@dataclass(frozen=True)
class System:
    """Somebody who can be asked. `identity` changes with all that its answers depend on; `facts` go to the report.

    `reads`: knows likelihoods, so that it can choose and read. `open` loads it; nothing is loaded before.
    """

    name: str
    kind: Literal["base", "tuned", "model", "gguf", "endpoint"]
    identity: str
    open: Callable[[], AbstractContextManager[Answering]]
    facts: Callable[[], dict[str, Any]] = dict
    reads: bool = True

    def key(self, request: Request) -> str:
        """Names the answer of this system to this request, whoever asks and whenever."""
        asked = [FORMAT, self.identity, type(request).__name__, asdict(request)]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


def by_kind(requests: Sequence[Request], kind: type) -> Iterator[tuple[int, Any]]:
    """The requests of one kind with their places."""
    return ((place, request) for place, request in enumerate(requests) if isinstance(request, kind))


def no_number() -> str:
    """Why there is no answer of a model whose weights are broken, or too large for its precision."""
    return _("What the model computes is no number.")


def until_first(text: str, ends: Sequence[str]) -> str:
    """The text before the first of `ends` in it."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text
