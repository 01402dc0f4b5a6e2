"""An OpenAI-compatible endpoint, asked: several questions at a time, in its own words.

It tells no likelihoods, so a label is what it writes, and one that is none of the labels counts as such.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afina.beside import each
from afina.data.conversation import Message
from afina.evaluate.systems.asking import Answer, Choose, Constraint, Continue, Request, Sink, Write
from afina.evaluate.tasks.text import normalised
from afina.language import _
from afina.model.endpoint import Endpoint, EndpointError, whole

AT_ONCE = 8
LABEL_TOKENS = 64


@dataclass(frozen=True)
class EndpointAnswering:
    """An endpoint; each question is a request of its own."""

    endpoint: Endpoint

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        """See `Answering`."""

        def one(place: int) -> Answer:
            began = time.perf_counter()
            try:
                found = self._one(requests[place])
            except EndpointError as error:
                found = Answer(error=error.message)
            return replace(found, seconds=time.perf_counter() - began)

        for place, found in each(one, range(len(requests)), AT_ONCE):
            sink(place, found)

    def _one(self, request: Request) -> Answer:
        match request:
            case Write():
                return self._write(request)
            case Choose():
                found = self._write(Write(request.messages, LABEL_TOKENS, Constraint(request.labels)))
                plain = normalised(found.text)
                label = next((label for label in request.labels if normalised(label) == plain), "")
                return Answer(label or found.text, found.tokens, found.ended)
            case Continue():
                return Answer(error=_("An endpoint is asked in conversations; it does not go on with bare texts."))
            case _:
                return Answer(error=_("An endpoint does not tell how likely a text is."))

    def _write(self, request: Write) -> Answer:
        options: dict[str, Any] = {}
        if request.constraint is not None:
            options["response_format"] = _response_format(request.constraint)
        answer = self.endpoint.chat(
            [_row(message) for message in request.messages],
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            **options,
        )
        text = answer.text.strip()
        if request.constraint is not None and request.constraint.choices:
            text = _unquoted(text)
        return Answer(text, answer.answered, answer.ended)


def _row(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _response_format(constraint: Constraint) -> dict[str, Any]:
    if constraint.choices:
        schema: dict[str, Any] = {"type": "string", "enum": list(constraint.choices)}
    else:
        schema = json.loads(constraint.schema or "{}")
        if not schema:
            return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _unquoted(text: str) -> str:
    """A label that came as JSON text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return whole(value) if isinstance(value, str) else text
