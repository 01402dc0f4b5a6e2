"""Who comes in, what a body may be, how many there may be, and the line that is written of each request.

All of it is decided before a body is read, and by what the request is, never by what it says of itself.
"""

import asyncio
import hmac
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from afina.console import Console
from afina.errors import AfinaError
from afina.language import _
from afina.serve.openai import error_body
from afina.serve.wish import Desk, Refusal

BODY_BYTES = 2**21
BODY_S = 30.0
"""Seconds for a body to arrive whole."""
BESIDE = 16
"""Requests that are let in beyond those that can wait: to be told that there is no room."""
RETRY_S = 2
THIS_MACHINE = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.ASCII | re.IGNORECASE)
"""Host headers that name it. A page of elsewhere, whose name was made to lead here, sends its own (DNS rebinding)."""


@dataclass
class House:
    """What all requests share. `places`: answers that may be under way or waiting. `key`: what lets in; None for all.
    `local`: nobody but this machine reaches it."""

    desk: Desk
    console: Console
    places: int
    key: str | None = None
    local: bool = True
    taken: int = 0
    stopping: bool = False

    @contextmanager
    def seats(self, count: int) -> Iterator[None]:
        """Inside the block so many places are taken. Raises Refusal where there are not so many."""
        if count > self.places:
            raise Refusal(
                _("{count} answers are wished, and there are {places} places.").format(count=count, places=self.places)
            )
        if self.taken + count > self.places:
            raise full()
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


class Gate:
    """Who comes in: nobody without the key, no page of another site, no more than there is room for; and what became of
    each is written down."""

    def __init__(self, app: Any, house: House) -> None:
        self._app, self._house, self._inside = app, house, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        began, facts = time.perf_counter(), scope.setdefault("afina", {})

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
            await send(message)

        self._inside += 1
        try:
            if problem := self._problem(scope):
                await respond(problem)(scope, receive, noted)
            else:
                await self._app(scope, _Bounded(receive), noted)
        except Exception as error:
            if self._house.console.debug:
                raise
            reason = f"{type(error).__name__}: {error}"
            self._house.console.warn(_("This is a mistake in afina: {reason}").format(reason=reason))
        finally:
            self._inside -= 1
            self._log(scope, facts, time.perf_counter() - began)

    def _problem(self, scope: Any) -> Refusal | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._house.key is not None:
            given = headers.get(b"authorization", "").removeprefix("Bearer ").encode()
            if scope["path"] != "/health" and not hmac.compare_digest(given, self._house.key.encode()):
                return Refusal(
                    _("The key is missing or wrong."),
                    status=401,
                    code="invalid_api_key",
                    hint=_("Send it as Authorization: Bearer KEY."),
                )
        elif sum(name == b"host" for name, _value in scope["headers"]) != 1 or (
            self._house.local and not THIS_MACHINE.fullmatch(host)
        ):
            return Refusal(_("This server answers to its own address alone."), status=403)
        elif origin is not None and origin.partition("://")[2] != host:
            return Refusal(_("Pages of other sites are not answered without a key."), status=403)
        if self._inside > self._house.places + BESIDE:
            return full()
        return None

    def _log(self, scope: Any, facts: Mapping[str, Any], seconds: float) -> None:
        request = f"{scope['method']} {scope['path']}"[:80]
        status, tokens = facts.get("status", "-"), facts.get("tokens")
        rest = facts.get("left") or ""
        if tokens is not None:
            rest = _("{model}, {asked} + {tokens} tokens, {rate:.0f} tokens/s").format(
                model=facts["model"], asked=facts["asked"], tokens=tokens, rate=tokens / max(seconds, 1e-3)
            ) + (f", {rest}" if rest else "")
        with suppress(OSError):  # who reads the log may go
            self._house.console.line(f"{request} {status} {seconds:.2f} s  {rest}".rstrip())
            self._house.console.event("request", request=request, seconds=round(seconds, 4), **facts)


class _Bounded:
    """A body that has to be small and to arrive in time. What comes later, that the client is gone, may take as long as
    it wants."""

    def __init__(self, receive: Any) -> None:
        self._receive, self._until, self._left = receive, time.monotonic() + BODY_S, BODY_BYTES
        self._whole = False

    async def __call__(self) -> Any:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408) from None
        self._whole = message["type"] != "http.request" or not message.get("more_body")
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413)
        return message


def as_refusal(error: AfinaError, status: int = 400) -> Refusal:
    """An error of the house as an answer to a request: what cannot be answered is the request's fault."""
    return Refusal(error.message, status=status, hint=error.hint)


def full() -> Refusal:
    """There is no room."""
    return Refusal(
        _("All places are taken."), status=503, code="overloaded", hint=_("Try again in {s} s.").format(s=RETRY_S)
    )


def respond(error: Refusal) -> JSONResponse:
    """An error as it is sent."""
    headers = {"Retry-After": str(RETRY_S)} if error.code == "overloaded" else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)
