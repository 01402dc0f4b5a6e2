"""A conversation over several turns: one history per speaker, what fits into the context, one seed per turn.

Knows nothing of terminals or servers, nor of how a speaker comes to its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from afina.data.conversation import Message
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Chat
from afina.serve.speakers import Speaker

OnPiece = Callable[[str, str], bool | None]
"""Sees the speaker's name and a piece of its answer; the first piece is empty and says that the speaker begins. A true
answer stops this answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One speaker's answer. `stopped`: the user cut it short. `forgotten`: turns dropped to make room for it."""

    name: str
    text: str
    stopped: bool = False
    forgotten: int = 0


OnReply = Callable[[Reply], object]


class Session:
    """Speakers side by side, each with a conversation of its own, asked the same questions.

    `limit` is the context in tokens. The k-th question after a reset is sampled with `seed` + k, by every speaker.
    """

    def __init__(self, speakers: Sequence[Speaker], settings: Chat, *, seed: int = 0, limit: int | None = None) -> None:
        self.speakers = tuple(speakers)
        self.settings = settings
        self._changed: dict[str, Any] = {}
        self.limit = limit
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Begin anew; the system message and the settings stay."""
        self._histories: list[list[Message]] = [[] for _speaker in self.speakers]
        self._asked = 0

    def set_system(self, text: str | None) -> None:
        """Replace the system message (None or empty: have none) and begin anew: earlier answers obeyed another."""
        self.change(system=text or None)
        self.reset()

    def change(self, **settings: Any) -> None:
        """Replace settings, checked as the recipe's are. Raises ValueError."""
        self.settings = Chat.model_validate({**self.settings.model_dump(), **settings})
        self._changed |= settings

    def go_on_with(self, settings: Chat) -> None:
        """Take another's settings, but for those that were changed here."""
        self.settings = Chat.model_validate({**settings.model_dump(), **self._changed})

    def history(self, place: int = 0) -> tuple[Message, ...]:
        """What speaker number `place` said and was told, without the system message."""
        return tuple(self._histories[place])

    def ask(self, text: str, on_text: OnPiece | None = None, on_reply: OnReply | None = None) -> list[Reply]:
        """Ask every speaker in turn; `on_reply` sees each reply once it is whole.

        Ctrl-C stops the answer being given; what it said so far stays said. Raises AfinaError when the question cannot
        be put to a speaker; then, as with whatever `on_text` or `on_reply` raises, the conversation is as before.
        """
        question = Message("user", text)
        histories, replies = [], []
        for place in range(len(self.speakers)):
            history, reply = self._turn(place, question, on_text)
            histories.append(history)
            replies.append(reply)
            if on_reply:
                on_reply(reply)
        self._histories = histories
        self._asked += 1
        return replies

    def _turn(self, place: int, question: Message, on_text: OnPiece | None) -> tuple[list[Message], Reply]:
        """One speaker's history after the question, and its reply."""
        speaker, history = self.speakers[place], self._histories[place]
        kept, settings = self._fit(speaker, history, question)
        text, stopped = self._answer(speaker, [*self._system(), *kept, question], settings, on_text)
        said = [question, Message("assistant", text)] if text or not stopped else []
        return [*kept, *said], Reply(speaker.name, text, stopped, (len(history) - len(kept)) // 2)

    def _answer(
        self, speaker: Speaker, messages: list[Message], settings: Chat, on_text: OnPiece | None
    ) -> tuple[str, bool]:
        """The text, and whether it was stopped by Ctrl-C or by `on_text`."""
        pieces: list[str] = []
        stopped = False

        def on_piece(piece: str) -> bool:
            nonlocal stopped
            pieces.append(piece)
            stopped = bool(on_text and on_text(speaker.name, piece))
            return stopped

        try:
            if not on_piece(""):
                speaker.answer(messages, settings, self._seed + self._asked, on_piece)
        except KeyboardInterrupt:
            stopped = True
        return "".join(pieces), stopped

    def _fit(self, speaker: Speaker, history: list[Message], question: Message) -> tuple[list[Message], Chat]:
        """The newest turns that leave room for an answer, and the settings with that room as their limit.

        Room is kept for max_new_tokens, but for no more than half the context: a setting larger than the model must
        not cost it its memory.
        """
        wanted = self.settings.max_new_tokens
        if self.limit is None:
            return history, self.settings
        room = min(wanted, max(1, self.limit // 2))
        while (length := speaker.length([*self._system(), *history, question])) + room > self.limit and history:
            history = history[2:]
        if length >= self.limit:
            raise DataError(
                _("The question is {length} tokens long with all that belongs to it; {name} takes {limit}.").format(
                    length=length, name=speaker.name, limit=self.limit
                ),
                hint=_("Shorten the question or the system message."),
            )
        return history, self.settings.model_copy(update={"max_new_tokens": min(wanted, self.limit - length)})

    def _system(self) -> list[Message]:
        return [Message("system", self.settings.system)] if self.settings.system else []
