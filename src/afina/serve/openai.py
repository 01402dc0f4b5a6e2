"""OpenAI's API, what of it there is here: requests as pydantic checks them, and the shapes of answers.

Only what is named here is taken. A part of a request that means something else, or nothing here, is refused by name and
never passed over; what is null was not said. Knows no HTTP and no model.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from afina.data.conversation import Message
from afina.data.messages import message_from
from afina.data.row import BadRow
from afina.language import _
from afina.recipe.explain import nearest
from afina.serve.wish import Over, Piece, Refusal, Said, Wish

MOST_MESSAGES, MOST_PROMPTS, MOST_ANSWERS, MOST_STOPS, MOST_BIASES = 2048, 64, 16, 16, 1024
SCHEMA_CHARACTERS, DEPTH = 2**16, 64
PARTS = {"role", "content", "name", "tool_calls", "tool_call_id", "thinking", "reasoning", "reasoning_content"}
"""What a message may hold; what an answer of OpenAI's holds beside that may come back empty."""
RETURNED = {"refusal", "audio", "function_call", "annotations"}

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Request(BaseModel):
    """What both kinds of requests share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: dict[str, bool] = Field(default_factory=dict)
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # Whom to bill and how to keep things: they say nothing about the answer, and nothing is kept here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_said(cls, value: Any) -> Any:
        if _depth(value) > DEPTH:
            raise ValueError(_("The body is more than {depth} levels deep.").format(depth=DEPTH))
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the number of tokens. Raises Refusal."""
        if unknown := set(self.stream_options) - {"include_usage"}:
            raise not_supported(f"stream_options.{min(unknown)}")
        return self.stream_options.get("include_usage", False)

    def _wish(self, **more: Any) -> Wish:
        if len(self.logit_bias) > MOST_BIASES or any(index < 0 for index in self.logit_bias):
            raise Refusal(
                _("logit_bias names up to {count} tokens by id.").format(count=MOST_BIASES), param="logit_bias"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        given: dict[str, Any] = {
            "model": self.model,
            "count": self.n,
            "room": self.max_tokens,
            "temperature": self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, 1e-9),  # 0 is the likeliest token
            "presence": self.presence_penalty,
            "frequency": self.frequency_penalty,
            "bias": self.logit_bias,
            "stop": stops,
            "seed": self.seed,
        }
        return Wish(**{**given, **more})


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None

    def wish(self) -> Wish:
        """What is wished. Raises Refusal."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Refusal(
                _("max_tokens and max_completion_tokens are the same, and say two things."), param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(_("top_logprobs needs logprobs: true."), param="top_logprobs")
        return self._wish(
            messages=tuple(_messages(self.messages)),
            room=self.max_completion_tokens or self.max_tokens,
            top=(self.top_logprobs or 0) if self.logprobs else None,
            schema=_schema(self.response_format),
            effort=self.reasoning_effort,
        )


class TextRequest(_Request):
    """POST /v1/completions: bare texts, or ids, without a template. Control tokens in a text stay text."""

    prompt: (
        str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | list[list[int]]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: int | None = None

    def wish(self) -> Wish:
        """What is wished. Raises Refusal."""
        if self.best_of not in (None, self.n):
            raise not_supported("best_of")
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if len(prompts) > MOST_PROMPTS:
            raise Refusal(_("There may be {count} prompts at once.").format(count=MOST_PROMPTS), param="prompt")
        texts = tuple(one if isinstance(one, str) else tuple(one) for one in prompts)
        return self._wish(texts=texts, top=self.logprobs)


def _messages(values: Sequence[Any]) -> Iterable[Message]:
    for number, value in enumerate(values, 1):
        try:
            extra = (
                set(value) - PARTS - {key for key in RETURNED if not value.get(key)} if isinstance(value, dict) else ()
            )
            if extra:
                raise not_supported(f"messages.{number - 1}.{min(extra)[:40]}")
            message = message_from(value, number)
            (message.content + message.more).encode()
        except (BadRow, UnicodeEncodeError) as error:
            half = _("message {number} holds half a character").format(number=number)
            said = str(error) if isinstance(error, BadRow) else half
            raise Refusal(f"{said}.", param=f"messages.{number - 1}") from error
        yield message


def _schema(wanted: Mapping[str, Any] | None) -> str | None:
    """The JSON Schema that answers must fit, as text; None where any text will do."""
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return "{}"
    form = wanted.get("json_schema")
    schema = form.get("schema") if isinstance(form, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise Refusal(
            _("response_format is {form}, json_object or text.").format(
                form='{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
            ),
            param="response_format",
        )
    text = json.dumps(schema)
    if len(text) > SCHEMA_CHARACTERS:
        raise Refusal(
            _("A schema has up to {size} characters.").format(size=SCHEMA_CHARACTERS), param="response_format"
        )
    return text


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for part in inside for one in part]
    return deepest


def not_supported(name: str, known: Iterable[str] = ()) -> Refusal:
    """A part of a request that means nothing here."""
    near = nearest(name, list(known))
    hint = _("Did you mean {nearest}?").format(nearest=near) if near else _("Leave it out.")
    return Refusal(_("{param} is not supported.").format(param=name), param=name, code="unsupported", hint=hint)


def refused(problem: Mapping[str, Any], known: Iterable[str]) -> Refusal:
    """What pydantic found, in a sentence."""
    place = [str(part) for part in problem["loc"] if part != "body"]
    kind, param = problem["type"], place[0] if place else ""
    if kind == "json_invalid":
        reason = problem["ctx"]["error"]
        return Refusal(_("The body is not valid JSON: {reason}.").format(reason=reason), code="invalid_json")
    if kind == "value_error":
        return Refusal(str(problem["ctx"]["error"]))
    if not param:
        hint = _("Send an object, with Content-Type: application/json.")
        return Refusal(_("The body is not a JSON object."), hint=hint, code="invalid_json")
    if kind == "extra_forbidden":
        return not_supported(param[:80], known)
    if kind == "missing":
        return Refusal(_("{param} is missing.").format(param=param), param=param)
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return Refusal(_("{param}: {reason}.").format(param=param, reason=said[:200]), param=param)


def error_body(error: Refusal) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    message = f"{error.message} {error.hint}".strip()
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def chat_tokens(tokens: Sequence[Said]) -> dict[str, Any]:
    """Likelihoods as chat completions tell them."""
    return {
        "content": [
            {**_token(one.text, one.logprob), "top_logprobs": [_token(*other) for other in one.top]} for one in tokens
        ],
        "refusal": None,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    """A token that is a part of a character has no bytes to tell."""
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": None if "\ufffd" in text else list(text.encode())}


def text_tokens(tokens: Sequence[Said], start: int) -> dict[str, Any]:
    """Likelihoods as completions tell them; `start`: characters that came before."""
    offsets, at = [], start
    for one in tokens:
        offsets.append(at)
        at += len(one.text)
    return {
        "tokens": [one.text for one in tokens],
        "token_logprobs": [max(one.logprob, -9999.0) for one in tokens],
        "top_logprobs": [dict(one.top) for one in tokens],
        "text_offset": offsets,
    }


@dataclass
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    tokens: list[Said] = field(default_factory=list)
    over: Over | None = None

    @property
    def finish(self) -> str | None:
        """OpenAI's word for why it ended."""
        return None if self.over is None else "length" if self.over.cut else "stop"


class ChatShape:
    """How chat completions look."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: list[Answer], logprobs: bool) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": chat_tokens(one.tokens) if logprobs else None,
                "finish_reason": one.finish,
            }
            for number, one in enumerate(answers)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices}

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A part of a stream."""
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}

    def first(self, number: int) -> dict[str, Any] | None:
        """What begins an answer."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, number: int, piece: Piece, before: int) -> dict[str, Any]:
        """What comes next of it."""
        told = chat_tokens(piece.tokens) if piece.tokens else None
        return {"index": number, "delta": {"content": piece.text}, "logprobs": told, "finish_reason": None}

    def last(self, number: int, finish: str | None) -> dict[str, Any]:
        """What ends it."""
        return {"index": number, "delta": {}, "logprobs": None, "finish_reason": finish}


class TextShape:
    """How completions look."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: list[Answer], logprobs: bool) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            self._choice(number, one.text, text_tokens(one.tokens, 0) if logprobs else None, one.finish)
            for number, one in enumerate(answers)
        ]
        return self.part(choices)

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A part of a stream looks as the whole does."""
        return {**self.head, "object": "text_completion", "choices": choices}

    def first(self, number: int) -> dict[str, Any] | None:
        """Nothing begins an answer."""
        return None

    def piece(self, number: int, piece: Piece, before: int) -> dict[str, Any]:
        """What comes next of it, after so many characters."""
        told = text_tokens(piece.tokens, before) if piece.tokens else None
        return self._choice(number, piece.text, told, None)

    def last(self, number: int, finish: str | None) -> dict[str, Any]:
        """What ends it."""
        return self._choice(number, "", None, finish)

    @staticmethod
    def _choice(number: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}
