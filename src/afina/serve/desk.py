"""Wishes answered by a model in memory, all those who come together: one thread writes, whoever asks.

Prompts are the renderer's, so they have the very ids of training, and answers end where those of a chat do. Knows no
HTTP.
"""

import queue
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from afina.errors import AfinaError
from afina.language import _
from afina.model.continuous import Asked, Ended, Likely, Writing
from afina.model.grammar import Vocabulary
from afina.model.rows import Sampling
from afina.recipe.schema import Chat
from afina.serve.speakers import Unfolding, given_of
from afina.serve.wish import Hear, Over, Piece, Refusal, Said, Ticket, Wish, check_prompt, room_for, stopping, unknown

if TYPE_CHECKING:
    from afina.data.template import Renderer
    from afina.data.tokenizer import Tokenizer
    from afina.model.personalities import Personalities


@dataclass(frozen=True)
class Voice:
    """One who can be asked: by what name the model in memory has it (None is the base), and as its recipe says."""

    name: str | None
    renderer: "Renderer"
    settings: Chat


class ModelDesk:
    """`voices` by what users call them; `limit` is the context in tokens, `at_once` how many answers are written
    together. The thread that writes ends with the process, or with `close`."""

    def __init__(self, crew: "Personalities", voices: Mapping[str, Voice], limit: int, at_once: int) -> None:
        self._voices, self._limit = dict(voices), limit
        self._writing = Writing(crew, at_once)
        self._inbox: queue.SimpleQueue[list[Asked] | None] = queue.SimpleQueue()
        self._deadline: float | None = None
        self._rendering = threading.Lock()
        self._vocabularies: dict[int, Vocabulary] = {}
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)
        self._thread.start()

    @property
    def models(self) -> tuple[str, ...]:
        """See `Desk`."""
        return tuple(self._voices)

    @property
    def limit(self) -> int:
        """See `Desk`."""
        return self._limit

    def take(self, wish: Wish, hear: Hear) -> Ticket:
        """See `Desk`."""
        if self._deadline is not None:
            raise stopping()
        if wish.model not in self._voices:
            raise unknown(wish.model, self.models)
        voice = self._voices[wish.model]
        settings, tokenizer = wish.settings(voice.settings), voice.renderer.tokenizer
        with self._rendering:  # renderer and tokenizer remember what they found
            prompts = self._prompts(wish, voice, settings)
            grammar = self._vocabulary(tokenizer).json(wish.schema) if wish.schema is not None else None
        seed = secrets.randbits(62) if wish.seed is None else wish.seed
        sampling = Sampling(settings.temperature, settings.top_p, wish.presence, wish.frequency, wish.bias)
        asked = []
        for number in range(wish.answers):
            prompt = prompts[number // wish.count]
            telling = _Telling(number, tokenizer, wish, hear)
            asked.append(
                Asked(
                    number,
                    prompt,
                    (seed + number) % 2**63,
                    room_for(len(prompt), settings, self._limit),
                    None if grammar is None else grammar(),
                    sampling=sampling,
                    voice=voice.name,
                    end_ids=frozenset(tokenizer.end_ids),
                    top=wish.top,
                    on_token=telling.on_token,
                    on_end=telling.on_end,
                )
            )
        self._inbox.put(asked)

        def cancel() -> None:
            for row in asked:
                row.gone = True

        return Ticket(sum(map(len, prompts)), cancel)

    def stop(self, seconds: float) -> None:
        """See `Desk`."""
        self._deadline = time.monotonic() + seconds
        self._inbox.put([])

    def close(self) -> None:
        """End the thread, once it is idle or `stop` made it so."""
        self._inbox.put(None)
        self._thread.join()

    def _prompts(self, wish: Wish, voice: Voice, settings: Chat) -> list[list[int]]:
        renderer = voice.renderer
        if not wish.texts:
            return [renderer.prompt(wish.conversation(voice.settings), given_of(settings, renderer.tokenizer.template))]
        size = len(renderer.tokenizer.hf)
        for text in wish.texts:
            check_prompt(text, size)
        return [renderer.text(text) if isinstance(text, str) else list(text) for text in wish.texts]

    def _vocabulary(self, tokenizer: "Tokenizer") -> Vocabulary:
        if id(tokenizer) not in self._vocabularies:
            self._vocabularies[id(tokenizer)] = Vocabulary(tokenizer.hf, tokenizer.end_ids)
        return self._vocabularies[id(tokenizer)]

    def _work(self) -> None:
        """What the thread does: whatever goes wrong in a model ends those it was answering, and not the server."""
        while self._take_in():
            if self._deadline is not None:
                self._wind_down()
            try:
                if self._writing.busy:
                    self._writing.turn()
            except Exception as error:  # noqa: BLE001 - a thread that ends would answer nobody any more
                self._writing.abandon(error)

    def _take_in(self) -> bool:
        """Those who have come; waits for somebody where there is nothing to do. False at the end."""
        while True:
            try:
                new = self._inbox.get(block=not self._writing.busy)
            except queue.Empty:
                return True
            if new is None:
                return False
            for row in new:
                self._writing.add(row)
            if not new:
                return True

    def _wind_down(self) -> None:
        waiting, self._writing.waiting = self._writing.waiting, []
        for row in waiting:
            row.on_end(stopping())
        if time.monotonic() > (self._deadline or 0.0):
            self._writing.abandon(stopping())


@dataclass
class _Telling:
    """Tokens of one answer to text for whoever listens, up to a stop text."""

    number: int
    tokenizer: "Tokenizer"
    wish: Wish
    hear: Hear
    _count: int = 0
    _untold: list[Said] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._text, self._until = Unfolding(self.tokenizer), Until(self.wish.stop)

    def on_token(self, index: int, likely: Likely | None) -> bool:
        """Tell what the token adds; true where a stop text has come."""
        self._count += 1
        if likely is not None:
            top = tuple((self.tokenizer.written(one), by) for one, by in likely.top.items())
            self._untold.append(Said(self.tokenizer.written(index), likely.chosen, top))
        self._tell(self._until.add(self._text.add(index)))
        return self._until.over

    def on_end(self, why: Ended | Exception) -> None:
        """Tell the rest, and that it is over."""
        if isinstance(why, Exception):
            self.hear(self.number, why if isinstance(why, AfinaError) else failed(why))
            return
        self._tell(self._until.add(self._text.finish()) + self._until.rest())
        self.hear(self.number, Over(why == "limit", self._count + (why == "end")))

    def _tell(self, text: str) -> None:
        if text or self._untold:
            self.hear(self.number, Piece(text, tuple(self._untold)))
            self._untold.clear()


class Until:
    """A text that comes in pieces, up to the first of some stop texts; what may become one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.over = stops, "", False

    def add(self, piece: str) -> str:
        """What is sure to be told now."""
        if self.over:
            return ""
        text = self._held + piece
        if found := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self.over, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text

    def rest(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held


def failed(error: Exception) -> Refusal:
    """What is said of an error that is none of the request's."""
    if type(error).__name__ == "OutOfMemoryError":
        return Refusal(_("The memory of the GPU ran out."), status=503, code="overloaded")
    return Refusal(
        _("This is a mistake in afina: {kind}: {reason}").format(
            kind=type(error).__name__, reason=(str(error).strip() or "-").split("\n")[0][:200]
        ),
        status=500,
    )
