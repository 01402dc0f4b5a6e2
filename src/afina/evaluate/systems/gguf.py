"""A GGUF file, asked in real llama.cpp, with the template and tokenizer that lie in the file."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from afina.data.conversation import Message
from afina.errors import DataError, ModelError
from afina.evaluate.systems.asking import (
    Answer,
    Choose,
    Constraint,
    Continue,
    Read,
    Request,
    Sink,
    Weigh,
    Write,
    no_number,
    until_first,
)
from afina.model.llamacpp import LlamaCpp, completion_request

TOP = 40
"""How many next tokens llama.cpp is asked for when labels are weighed; the whole vocabulary where one is not there."""

PromptOf = Callable[[LlamaCpp], Callable[[Sequence[Message]], list[int]]]
"""Makes, for an open file, the function from a conversation to the ids of its prompt."""


@dataclass(frozen=True)
class Tree:
    """What follows what in a set of token sequences, so that what they share is asked once."""

    paths: list[list[int]]
    nexts: dict[tuple[int, ...], set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.paths:
            for place, index in enumerate(path):
                self.nexts.setdefault(tuple(path[:place]), set()).add(index)


class Weighing(LlamaCpp):
    """A GGUF file that can be asked how likely a text is as the answer."""

    _proved = False

    def sums(self, prompt: list[int], paths: list[list[int]]) -> list[float]:
        """The log-probability of each path after the prompt."""
        return [total for total, _greedy in self.weigh(prompt, paths)]

    def weigh(self, prompt: list[int], paths: list[list[int]]) -> list[tuple[float, bool]]:
        """The log-probability of each path after the prompt, and whether each of its tokens is the likeliest."""
        tree, known = Tree(paths), {}
        for prefix, wanted in sorted(tree.nexts.items()):  # neighbours share a beginning, which llama.cpp keeps
            known[prefix] = self._next([*prompt, *prefix], wanted)
        found = []
        for path in paths:
            steps = [(known[tuple(path[:place])], index) for place, index in enumerate(path)]
            greedy = all(nexts[index] >= max(nexts.values()) for nexts, index in steps)
            found.append((sum(nexts[index] for nexts, index in steps), greedy))
        return found

    def write(self, prompt: list[int], request: Write) -> dict[str, Any]:
        """llama.cpp's answer to one request. Raises ModelError where what it computes is no number: it would write on,
        and say nothing of it."""
        if not self._proved:
            self._next(prompt, set(), 1)
            self._proved = True
        body = completion_request(
            prompt, request.max_new_tokens, request.temperature, 1.0, request.seed % 2**31, (), False
        )
        return self._call("POST", "/completion", body | {"stream": False} | _constraint(request.constraint))

    @cached_property
    def end(self) -> list[int]:
        """The token that ends an answer."""
        name = str(self._call("GET", "/props").get("eos_token", ""))
        return self.tokenize(name, True)[:1] if name else []

    @cached_property
    def _harmless(self) -> int:
        """A token that is whole characters: see LlamaCpp.logprobs."""
        return self.tokenize("a", False)[-1]

    def _next(self, ids: list[int], wanted: set[int], top: int = TOP) -> dict[int, float]:
        body = completion_request(ids, 1, 0.0, 1.0, 0, (), True)
        body |= {"stream": False, "n_probs": top, "logit_bias": [[self._harmless, 1e9]]}
        entries = self._call("POST", "/completion", body)["completion_probabilities"][0]["top_logprobs"]
        if any(entry["logprob"] is None for entry in entries):
            raise ModelError(no_number(), file=self.path)
        found = {int(entry["id"]): float(entry["logprob"]) for entry in entries}
        if wanted <= found.keys():
            return found
        if len(entries) < top:  # llama.cpp leaves out what has no probability at all
            return {**dict.fromkeys(wanted, -1e3), **found}
        return self._next(ids, wanted, top * 2**6)


@dataclass(frozen=True)
class GgufAnswering:
    """An open GGUF file."""

    llama: Weighing
    prompt: Callable[[Sequence[Message]], list[int]]

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        """See `Answering`."""
        for place, request in enumerate(requests):
            began = time.perf_counter()
            try:
                found = self._one(request)
            except (DataError, ModelError) as error:
                found = Answer(error=error.message)
            sink(place, Answer(**{**found.dump(), "seconds": time.perf_counter() - began}))

    def _one(self, request: Request) -> Answer:
        if isinstance(request, Continue | Weigh):
            return self._bare(request)
        prompt = self.prompt(request.messages)
        match request:
            case Write():
                answer = self.llama.write(prompt, request)
                ended = str(answer["stop_type"]) == "eos"
                return Answer(str(answer["content"]).strip(), len(answer["tokens"]), ended)
            case Choose():
                paths = [self.llama.tokenize(label, False) + self.llama.end for label in request.labels]
                sums = self.llama.sums(prompt, paths)
                means = [total / len(path) for total, path in zip(sums, paths, strict=True)]
                best = max(range(len(means)), key=means.__getitem__)
                return Answer(request.labels[best], sum(map(len, paths)), True, scores=means)
            case Read():
                path = self.llama.tokenize(request.answer, False) + self.llama.end
                return Answer("", len(path), True, scores=self.llama.sums(prompt, [path]))

    def _bare(self, request: Continue | Weigh) -> Answer:
        ids = partial(self.llama.tokenize, special=True, add_special=True)
        if isinstance(request, Continue):
            wanted = Write((), request.max_new_tokens, None, request.temperature, request.seed)
            answer = self.llama.write(ids(request.text), wanted)
            text = until_first(str(answer["content"]), request.until)
            return Answer(text, len(answer["tokens"]), str(answer["stop_type"]) == "eos")
        if request.text:
            whole, known = ids(request.text + request.continuation), len(ids(request.text.rstrip()))
        else:
            first = ids("")[:1] or self.llama.end
            whole, known = first + self.llama.tokenize(request.continuation, True), len(first)
        ((total, greedy),) = self.llama.weigh(whole[:known], [whole[known:]])
        return Answer("", len(whole) - known, True, scores=[total, float(greedy)])


def _constraint(constraint: Constraint | None) -> dict[str, Any]:
    if constraint is None:
        return {}
    if constraint.choices:
        return {
            "grammar": "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.choices)
        }
    schema = json.loads(constraint.schema or "{}")
    return {"json_schema": schema or {"type": "object"}}
