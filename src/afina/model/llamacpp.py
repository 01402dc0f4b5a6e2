"""A GGUF file, run by real llama.cpp: the program that people will run it with, not our idea of it.

The one door to `xllamacpp`, an optional package that carries llama.cpp and its server. The server runs on threads of
this process and listens on 127.0.0.1, on a free port, behind a key made for the occasion; this module is its client.
Knows nothing of how the file was made.
"""

import ctypes
import http.client
import json
import os
import secrets
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from afina.apart import cores
from afina.errors import ModelError, ResourceError
from afina.gguf_file import GgufFile, Strings
from afina.language import _

TEMPLATE_KEY = "tokenizer.chat_template"

TIMEOUT = 600.0
"""Seconds without a byte after which llama.cpp counts as stuck. A long prompt on a slow machine takes minutes."""

SMALL_BYTES = 64 * 2**20
"""A file that one core reads in about 5 ms, its cost a token. Below, threads lose more in waiting for each other than
they gain: 1,000 tokens of a model of 16 MB took 1.1 s on one thread and 12 s on two, on two cores that were busy."""

SILENT = -1
"""llama.cpp writes nothing, not even errors, to the terminal: what it refuses comes back as an answer."""

Ended = Literal["end", "limit", "stop"]
SENTENCEPIECE = {"llama", "t5"}
"""What GGUF calls the tokenizers that mark the beginning of a text."""
ENDS: dict[str, Ended] = {"eos": "end", "word": "stop"}
"""llama.cpp's reasons for ending, as ours."""


@dataclass(frozen=True)
class Completion:
    """What llama.cpp wrote.

    `ids` are the new tokens, the end token among them; `text` is their text without control tokens. `ended` says why:
    "end" of the answer, the "limit" of tokens, or a "stop" text.
    """

    ids: list[int]
    text: str
    ended: Ended


class LlamaCpp:
    """A loaded GGUF file. Use as a context manager, or call `close`; nothing of it stays behind.

    `context` is how many tokens prompt and answer may have together (0: as many as the model was trained for).
    `slots` answers are written at once, each in a context of its own.
    `threads` defaults to the physical cores this process may use, or 1 where the file is small. `cache` is the type of
    the keys and values kept: f16 is what llama.cpp does by itself, f32 is for comparing with another implementation to
    the last digits.

    Raises ResourceError when `xllamacpp` is missing, ModelError when llama.cpp cannot load the file.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        context: int = 4096,
        slots: int = 1,
        threads: int | None = None,
        gpu_layers: int = 0,
        cache: Literal["f16", "f32"] = "f16",
    ) -> None:
        self.path = Path(path)
        file = GgufFile(self.path)  # nothing hostile reaches llama.cpp
        self.template = file.value(TEMPLATE_KEY, str, None)
        self.vocabulary = len(file.value("tokenizer.ggml.tokens", Strings, None) or ())
        self._marks_beginnings = file.value("tokenizer.ggml.model", str, "") in SENTENCEPIECE
        self._key = secrets.token_hex(16)
        threads = threads or default_threads(self.path.stat().st_size)
        self._server: Any = _start(self.path, self._key, context, slots, threads, gpu_layers, cache)
        self._host = self._server.listening_address.removeprefix("http://")
        self._call("GET", "/lora-adapters")  # waits for the server's loop: closed before it runs, it would never end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server, join its threads and free the model."""
        self._server = None

    @property
    def context(self) -> int:
        """The tokens that prompt and answer may have together, as llama.cpp settled it."""
        return int(self._call("GET", "/props")["default_generation_settings"]["n_ctx"])

    def tokenize(self, text: str, special: bool, *, add_special: bool = False, inside: bool = False) -> list[int]:
        """The ids of a text. `special` takes control tokens in it as such; `add_special` adds BOS and EOS as the file
        says llama.cpp should. `inside`: it goes on with a text before it, so that SentencePiece's mark of a beginning,
        which llama.cpp puts before whatever it is given, is not put before it."""
        if inside and self._marks_beginnings:
            before, ids = self._line_end, self.tokenize(f"\n{text}", special)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        body = {"content": text, "parse_special": special, "add_special": add_special}
        return [int(index) for index in self._call("POST", "/tokenize", body)["tokens"]]

    @cached_property
    def _line_end(self) -> list[int]:
        return self.tokenize("\n", False)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens written out."""
        return str(self._call("POST", "/detokenize", {"tokens": list(ids)})["content"])

    def apply_template(self, messages: Sequence[Mapping[str, str]], given: Mapping[str, Any] | None = None) -> str:
        """The prompt that llama.cpp makes of a conversation with the file's own chat template.

        `given` is what the template is told beside the messages, such as reasoning_effort.

        Raises ModelError when the file has none: llama.cpp would silently suppose ChatML.
        """
        if self.template is None:
            raise ModelError(
                _("The file has no chat template."),
                hint=_("Set model.chat_template in the recipe, for instance to afina/alpaca, or to a Jinja file."),
                file=self.path,
            )
        body = {"messages": [dict(message) for message in messages], "chat_template_kwargs": dict(given or {})}
        return str(self._call("POST", "/apply-template", body)["prompt"])

    def complete(
        self,
        prompt: Sequence[int] | str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        reuse: bool = False,
    ) -> Completion:
        """Continue a prompt: ids as they are, or a text as llama.cpp tokenises it (BOS added, control tokens seen).

        Temperature 0 takes the likeliest token. `reuse` keeps what the prompt has in common with the one before, which
        is faster in a conversation; without it the answer depends on nothing but the arguments.
        """
        # Not streamed: there llama.cpp leaves out the ids of tokens that end inside a character.
        body = completion_request(prompt, max_new_tokens, temperature, top_p, seed, stop, reuse) | {"stream": False}
        answer = self._call("POST", "/completion", body)
        ids = [int(index) for index in answer["tokens"]]
        return Completion(ids, str(answer["content"]), ENDS.get(str(answer["stop_type"]), "limit"))

    def stream(
        self,
        prompt: Sequence[int] | str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        reuse: bool = True,
    ) -> Iterator[str]:
        """As `complete`, the text in pieces as they come. Closing the iterator stops llama.cpp."""
        with closing(self.told(prompt, max_new_tokens, temperature, top_p, seed, stop, reuse)) as told:
            for piece, _count, _ended in told:
                if piece:
                    yield piece

    def told(
        self,
        prompt: Sequence[int] | str,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        reuse: bool = True,
        bias: Mapping[int, float] | None = None,
    ) -> Generator[tuple[str, int, Ended | None]]:
        """As `stream`, with how many tokens there are so far, and in the end why it ended. `bias`: what is added to the
        logits of tokens, by id."""
        body = completion_request(prompt, max_new_tokens, temperature, top_p, seed, stop, reuse)
        if bias:
            body["logit_bias"] = [[index, by] for index, by in bias.items()]
        with closing(self._events(body)) as events:
            for event in events:
                count = int(event.get("tokens_predicted") or 0)
                ended = ENDS.get(str(event.get("stop_type")), "limit") if event.get("stop") else None
                yield str(event.get("content") or ""), count, ended

    def logprobs(self, ids: Sequence[int], *, top: int, start: int = 1) -> list[dict[int, float]]:
        """Entry i: natural log-probabilities of the `top` likeliest tokens after ids[: start + i], the likeliest first,
        up to those after all of `ids`."""
        found = []
        # Where the chosen token ends inside a character, llama.cpp keeps text and log-probabilities back. So a harmless
        # token is chosen; the bias touches the choice, not the log-probabilities, which are of the logits.
        harmless = self.tokenize("a", False)[-1]
        for end in range(start, len(ids) + 1):
            entries = self._forced(ids[:end], harmless, 1, n_probs=top)["completion_probabilities"][0]["top_logprobs"]
            found.append({int(entry["id"]): float(entry["logprob"]) for entry in entries})
        return found

    def ends_at(self, ids: Sequence[int], token: int) -> bool:
        """Whether an answer to `ids` is over when the model says `token`."""
        return bool(self._forced(ids, token, 2)["stop_type"] == "eos")

    def _forced(self, ids: Sequence[int], token: int, count: int, **asked: int) -> dict[str, Any]:
        """What llama.cpp says of an answer of `count` tokens that are all `token`."""
        body = (
            completion_request(ids, count, 0.0, 1.0, 0, (), True)
            | {"stream": False, "logit_bias": [[token, 1e9]]}
            | asked
        )
        return self._call("POST", "/completion", body)

    def _events(self, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        with closing(self._open("POST", "/completion", body)) as connection:
            response = _response(connection, self.path)
            while line := response.readline():
                name, _colon, content = line.partition(b":")
                if name in (b"data", b"error") and content.strip() != b"[DONE]":
                    event = json.loads(content)
                    _raise_error(event if name == b"data" else {"error": event}, self.path)
                    yield event

    def _call(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with closing(self._open(method, route, body)) as connection:
            answer: dict[str, Any] = json.loads(_response(connection, self.path).read())
        return answer

    def _open(self, method: str, route: str, body: dict[str, Any] | None) -> http.client.HTTPConnection:
        if self._server is None:
            raise ModelError(_("The model is closed."), file=self.path)
        connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        connection.request(method, route, None if body is None else json.dumps(body), headers)
        return connection


def default_threads(bytes_of_file: int) -> int:
    """Physical cores that this process may run on, for llama.cpp gains nothing from two threads on one core; one core
    for a file that is small."""
    if bytes_of_file < SMALL_BYTES:
        return 1
    return max(1, min(psutil.cpu_count(logical=False) or cores(), cores()))


def _start(path: Path, key: str, context: int, slots: int, threads: int, gpu_layers: int, cache: str) -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ResourceError(
            _("Running a GGUF file needs the package xllamacpp, which is not installed."),
            hint=_('Run: pip install "afina[gguf-run]"'),
        ) from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.hostnames, parameters.port, parameters.api_keys = ["127.0.0.1"], 0, [key]
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context * slots, slots, gpu_layers
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_threads_http = slots + 1  # an answer takes one as long as it comes
    parameters.verbosity = SILENT
    parameters.offline, parameters.use_jinja = True, True
    parameters.ui = parameters.warmup = parameters.fit_params = parameters.endpoint_slots = False
    if cache == "f32":
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with _kept_signals():
        try:
            return xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ModelError(
                _("llama.cpp cannot load the file."),
                hint=_(
                    "It may be damaged, of an architecture this llama.cpp does not know, or larger than the memory."
                ),
                file=path,
            ) from error


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Put back the handlers of SIGINT and SIGTERM, which the server of llama.cpp takes for itself.

    Through the C library, because Python lets only the main thread do it and does not know handlers it did not set.
    """
    if os.name != "posix":
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    kept = {number: ctypes.create_string_buffer(1024) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, action in kept.items():
        library.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            library.sigaction(int(number), action, None)


def completion_request(
    prompt: Sequence[int] | str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Sequence[str],
    reuse: bool,
) -> dict[str, Any]:
    """The body of a completion: nothing but temperature, then nucleus, in the order of transformers."""
    return {
        "prompt": prompt if isinstance(prompt, str) else [int(index) for index in prompt],
        "n_predict": max_new_tokens,
        "samplers": ["temperature", "top_p"],
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": list(stop),
        "cache_prompt": reuse,
        "return_tokens": True,
        "stream": True,
    }


def _response(connection: http.client.HTTPConnection, path: Path) -> http.client.HTTPResponse:
    try:
        response = connection.getresponse()
    except OSError as error:
        raise ModelError(_("llama.cpp does not answer: {reason}.").format(reason=error), file=path) from error
    if response.status != http.client.OK:
        content = response.read()
        with suppress(ValueError):
            _raise_error(json.loads(content), path)
        raise ModelError(_("llama.cpp refuses: {reason}").format(reason=content.decode("utf-8", "replace")), file=path)
    return response


def _raise_error(answer: Any, path: Path) -> None:
    error = answer.get("error") if isinstance(answer, dict) else None
    if error is not None:
        reason = error.get("message", error) if isinstance(error, dict) else error
        raise ModelError(_("llama.cpp refuses: {reason}").format(reason=reason), file=path)
