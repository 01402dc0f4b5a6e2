"""An OpenAI-compatible endpoint: chat completions over HTTP, nothing else of it. The client side only.

What is temporary (too many requests, a server that restarts) is tried again, waiting longer each time; what is not
comes back as EndpointError. The key is read from an environment variable, so that it stands in no recipe, no manifest
and no message.
"""

import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from afina.errors import ModelError, RecipeError
from afina.language import _

TIMEOUT = 300.0
"""Seconds without a byte after which an answer is given up."""
PATIENCE = (0.5, 2.0, 8.0)
"""Seconds waited before each further try."""
GONE_AFTER = 4
"""Requests in a row that no one answered, after which the endpoint counts as gone and is asked no more."""
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
ANSWER_BYTES = 2**24


class EndpointError(ModelError):
    """This question got no answer."""


@dataclass(frozen=True)
class Completion:
    """What came back. `asked`, `answered`: tokens of question and answer, 0 where the endpoint does not tell or what it
    tells cannot be. `ended`: the answer was not cut off."""

    text: str
    asked: int
    answered: int
    ended: bool


@dataclass
class Endpoint:
    """`url` is what the API's documentation calls the base URL, such as http://127.0.0.1:8000/v1."""

    url: str
    model: str
    key_variable: str | None = None
    patience: Sequence[float] = PATIENCE
    timeout: float = TIMEOUT
    _unreached: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """How it is called in reports: without what a URL may hold of secrets."""
        return f"{urlsplit(self.url).hostname}#{self.model}"

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0, **options: Any
    ) -> Completion:
        """One completion. Raises EndpointError."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            **options,
        }
        reason = ""
        for wait in (0.0, *self.patience):
            if self._unreached >= GONE_AFTER:
                raise EndpointError(_("{name} went away: {reason}").format(name=self.name, reason=reason or "-"))
            time.sleep(wait)
            try:
                status, content = self._post(json.dumps(body).encode())
            except (OSError, http.client.HTTPException, ssl.SSLError) as error:
                reason = str(error) or type(error).__name__
                self._count(1)
                continue
            self._count(None)
            if status == http.client.OK:
                return self._parsed(content)
            reason = f"{status} {_said(content)}"
            if status not in AGAIN:
                break
        raise EndpointError(_("{name} gave no answer: {reason}").format(name=self.name, reason=reason))

    def _count(self, more: int | None) -> None:
        with self._lock:
            self._unreached = 0 if more is None else self._unreached + more

    def _post(self, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        maker = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = maker(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            headers = {"Content-Type": "application/json", **self._authorization()}
            connection.request("POST", parts.path.rstrip("/") + "/chat/completions", body, headers)
            if connection.sock is not None:
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            response = connection.getresponse()
            return response.status, response.read(ANSWER_BYTES)
        finally:
            connection.close()

    def _authorization(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable)
        if not key:
            raise RecipeError(
                _("The environment variable {name} is not set.").format(name=self.key_variable),
                hint=_("It should hold the key of {url}.").format(url=urlsplit(self.url).hostname),
            )
        return {"Authorization": f"Bearer {key}"}

    def _parsed(self, content: bytes) -> Completion:
        try:
            answer = json.loads(content)
            choice, usage = answer["choices"][0], answer.get("usage")
            if isinstance(choice["message"], dict):
                text = whole(str(choice["message"].get("content") or ""))
                asked, answered = (_tokens(usage, name) for name in ("prompt_tokens", "completion_tokens"))
                return Completion(text, asked, answered, choice.get("finish_reason") != "length")
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        raise EndpointError(
            _("{name} gave no answer: {reason}").format(name=self.name, reason=_("it is no chat completion"))
        )


def _said(content: bytes) -> str:
    """What a refusal says, in one short line."""
    try:
        error = json.loads(content).get("error")
        said = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        said = None
    return whole(" ".join(str(said or content.decode("utf-8", "replace")).split())[:200])


def _tokens(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count <= ANSWER_BYTES else 0


def whole(text: str) -> str:
    """The text with a question mark for each half of a character: JSON may escape one, and no file can hold it."""
    return text.encode("utf-8", "replace").decode()
