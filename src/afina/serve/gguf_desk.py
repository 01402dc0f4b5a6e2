"""Wishes answered by a GGUF file in llama.cpp, some at once. Loads no torch.

What llama.cpp has, but not in the same sense as we have it (penalties, likelihoods, schemas), is refused.
"""

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from afina.errors import AfinaError
from afina.language import _
from afina.recipe.schema import Chat
from afina.serve.speakers import LLAMA_CPP_SEEDS, GgufSpeaker, given_of
from afina.serve.wish import Hear, Over, Piece, Refusal, Ticket, Wish, check_prompt, room_for, stopping, unknown

if TYPE_CHECKING:
    from afina.model.llamacpp import LlamaCpp


class GgufDesk:
    """`settings` are those of the run the file was exported from, where it is known; `slots` answers are written at
    once, as many as the file was opened with."""

    def __init__(self, name: str, llama: "LlamaCpp", settings: Chat, slots: int) -> None:
        self._name, self._llama, self._settings = name, llama, settings
        self._speaker, self._limit = GgufSpeaker(name, llama), llama.context
        self._pool = ThreadPoolExecutor(slots)
        self._rendering = threading.Lock()
        self._deadline: float | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """See `Desk`."""
        return (self._name,)

    @property
    def limit(self) -> int:
        """See `Desk`."""
        return self._limit

    def take(self, wish: Wish, hear: Hear) -> Ticket:
        """See `Desk`."""
        if self._deadline is not None:
            raise stopping()
        if wish.model != self._name:
            raise unknown(wish.model, self.models)
        _refuse_unlike(wish)
        settings = wish.settings(self._settings)
        with self._rendering:
            prompts = self._prompts(wish, settings)
        rooms = [room_for(len(prompt), settings, self._limit) for prompt in prompts]
        seed = secrets.randbits(31) if wish.seed is None else wish.seed
        gone = threading.Event()
        for number in range(wish.answers):
            place = number // wish.count
            asked = (prompts[place], rooms[place], settings, (seed + number) % LLAMA_CPP_SEEDS)
            self._pool.submit(self._answer, number, asked, wish, hear, gone)
        return Ticket(sum(map(len, prompts)), gone.set)

    def stop(self, seconds: float) -> None:
        """See `Desk`."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """End the threads, once they are idle or `stop` made them so."""
        self._pool.shutdown()

    def _prompts(self, wish: Wish, settings: Chat) -> list[list[int]]:
        if not wish.texts:
            given = given_of(settings, self._llama.template)
            return [self._speaker.prompt(wish.conversation(self._settings), given)]
        size = self._llama.vocabulary
        for text in wish.texts:
            check_prompt(text, size)
        return [self._speaker.text(text) if isinstance(text, str) else list(text) for text in wish.texts]

    def _answer(
        self, number: int, asked: tuple[list[int], int, Chat, int], wish: Wish, hear: Hear, gone: threading.Event
    ) -> None:
        """What a thread does for one answer."""
        (prompt, room, settings, seed), count = asked, 0
        try:
            if self._deadline is not None:
                raise stopping()
            told = self._llama.told(prompt, room, settings.temperature, settings.top_p, seed, wish.stop, bias=wish.bias)
            with closing(told):
                for piece, count, ended in told:
                    if gone.is_set():
                        return
                    if self._deadline is not None and time.monotonic() > self._deadline:
                        raise stopping()
                    if piece:
                        hear(number, Piece(piece))
                    if ended is not None:
                        hear(number, Over(ended == "limit", count))
                        return
            raise Refusal(_("llama.cpp ended an answer without a word."), status=500)
        except AfinaError as error:
            hear(number, error if isinstance(error, Refusal) else Refusal(error.message, status=500))


def _refuse_unlike(wish: Wish) -> None:
    unlike = {
        "presence_penalty": wish.presence,
        "frequency_penalty": wish.frequency,
        "logprobs": wish.top is not None,
        "response_format": wish.schema,
    }
    if found := next((name for name, asked in unlike.items() if asked), None):
        raise Refusal(
            _("{param} is not supported for a GGUF file.").format(param=found),
            param=found,
            hint=_("Serve the run or the merged model instead."),
        )
