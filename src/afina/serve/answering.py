"""A wish being answered over HTTP, at once or as server-sent events. Its places are free again however that ends: when
all is said, when the client hangs up or stops reading, or when something goes wrong.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse, Response

from afina.errors import AfinaError
from afina.language import _
from afina.serve.gate import House, as_refusal, respond
from afina.serve.openai import Answer, ChatShape, TextShape, error_body
from afina.serve.wish import Over, Piece, Refusal, Ticket, Wish

STALLED_S = 60.0
"""Seconds a reader may take none of what is sent to it."""


class Answering(Response):
    """A wish being answered to whoever sent it. Its places are free again however that ends."""

    def __init__(self, house: House, wish: Wish, shape: ChatShape | TextShape, stream: bool, tells_usage: bool) -> None:
        super().__init__()
        self._house, self._wish, self._shape = house, wish, shape
        self._stream, self._tells_usage = stream, tells_usage
        self._answers = [Answer() for _number in range(wish.answers)]
        self._ticket: Ticket | None = None
        self._left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI: answers until all is said, or until the client is gone."""
        facts = scope["afina"]
        facts |= {"model": self._wish.model}
        try:
            with self._house.seats(self._wish.answers):
                work = asyncio.create_task(self._work(scope, receive, send))
                gone = asyncio.create_task(_gone(receive))
                try:
                    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if work.done():
                        work.result()
                    else:
                        facts["left"] = _("the client left")
                except TimeoutError:
                    facts["left"] = _("the client read nothing for {seconds:g} s").format(seconds=STALLED_S)
                finally:
                    self._left = True
                    work.cancel()
                    gone.cancel()
                    if self._ticket is not None:
                        self._ticket.cancel()
                        facts |= {"asked": self._ticket.tokens, "tokens": self._written}
        except Refusal as error:
            facts["left"] = error.message
            await respond(error)(scope, receive, send)

    @property
    def _written(self) -> int:
        return sum(one.over.tokens if one.over else len(one.tokens) for one in self._answers)

    async def _work(self, scope: Any, receive: Any, send: Any) -> None:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Over | AfinaError]]()

        def hear(number: int, event: Piece | Over | AfinaError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        await asyncio.to_thread(self._take, hear)
        first = await self._next(events)
        if self._stream:
            await self._told(first, events, send)
            return
        while any(one.over is None for one in self._answers):
            await self._next(events)
        body = {**self._shape.whole(self._answers, self._wish.top is not None), "usage": self._usage()}
        await _in_time(JSONResponse(body)(scope, receive, send))

    def _take(self, hear: Any) -> None:
        try:
            self._ticket = self._house.desk.take(self._wish, hear)
        except Refusal:
            raise
        except AfinaError as error:
            raise as_refusal(error) from error
        if self._left:
            self._ticket.cancel()

    async def _next(self, events: Any) -> tuple[int, Piece | Over]:
        """The next event, kept. Raises Refusal for an error."""
        number, event = await events.get()
        if isinstance(event, AfinaError):
            raise event if isinstance(event, Refusal) else as_refusal(event, 500)
        answer = self._answers[number]
        if isinstance(event, Over):
            answer.over = event
        else:
            answer.text += event.text
            answer.tokens += event.tokens
        return number, event

    async def _told(self, event: tuple[int, Piece | Over], events: Any, send: Any) -> None:
        """The answers as server-sent events."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(body: Mapping[str, Any] | str, more: bool = True) -> None:
            text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
            message = {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more}
            await _in_time(send(message))

        beside = {"usage": None} if self._tells_usage else {}
        begun: set[int] = set()
        while True:
            number, what = event
            if number not in begun:
                begun.add(number)
                if first := self._shape.first(number):
                    await tell({**self._shape.part([first]), **beside})
            if isinstance(what, Over):
                choice = self._shape.last(number, self._answers[number].finish)
            else:
                choice = self._shape.piece(number, what, len(self._answers[number].text) - len(what.text))
            await tell({**self._shape.part([choice]), **beside})
            if all(one.over for one in self._answers):
                break
            try:
                event = await self._next(events)
            except Refusal as error:
                await tell(error_body(error), more=False)
                return
        if self._tells_usage:
            await tell({**self._shape.part([]), "usage": self._usage()})
        await tell("[DONE]", more=False)

    def _usage(self) -> dict[str, int]:
        asked = self._ticket.tokens if self._ticket else 0
        return {"prompt_tokens": asked, "completion_tokens": self._written, "total_tokens": asked + self._written}


async def _in_time(sending: Any) -> None:
    async with asyncio.timeout(STALLED_S):
        await sending


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
