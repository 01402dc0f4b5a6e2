"""Tasks: ask a model held-out questions and mark its answers. Base and tuned are asked the very same prompts.

classification takes the likeliest of the labels, so that no accident of spelling decides; exact and json let the
model write freely and mark what it wrote.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from afina.data.batch import micro_batches
from afina.data.conversation import Sample
from afina.data.template import Renderer
from afina.engine.attention import covers, packed_attention
from afina.errors import DataError
from afina.evaluate.metrics import mcnemar, per_label, shares
from afina.language import _
from afina.model.generate import generate
from afina.model.load import Hardware, cache_bytes, limit_of
from afina.model.loss import token_losses
from afina.recipe.schema import Task

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
CACHE_AT_ONCE = {"cpu": 2**28, "cuda": 2**33}
"""Bytes that the keys and values of the answers being written may take together."""
PROMPTS_AT_ONCE = 256
LIKELY_CHANCE = 0.05
"""Two systems are said to differ when chance alone would do so in fewer than one case in twenty."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class System:
    """A model to be asked, under the name the report gives it. `active` is entered while it answers."""

    name: str
    model: nn.Module
    active: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Asked:
    """A task, the samples chosen for it, and how answers are marked."""

    task: Task
    samples: list[Sample]
    labels: list[str]


def prepare(task: Task, samples: Sequence[Sample], seed: int) -> Asked:
    """Choose the samples of a task. Raises DataError for answers the task cannot mark."""
    chosen = list(samples)
    if task.limit is not None and task.limit < len(chosen):
        salt = f"task {task.name} {seed}"
        chosen = sorted(chosen, key=lambda sample: sample.digest(salt))[: task.limit]
    labels: list[str] = []
    if task.kind == "classification":
        labels = task.labels or sorted({sample.answer.strip() for sample in chosen})
        for sample in chosen:
            if sample.answer.strip() not in labels:
                raise DataError(
                    _("The answer “{answer}” is none of the labels of task {task}.").format(
                        answer=sample.answer.strip()[:40], task=task.name
                    ),
                    file=sample.file,
                    line=sample.line,
                    hint=_("Add it to the task's labels, or mend the row. The labels are {labels}.").format(
                        labels=", ".join(labels)
                    ),
                )
    if task.kind == "json":
        for sample in chosen:
            if _field(sample.answer, task.field) is NOTHING:
                raise DataError(
                    _("The reference answer of task {task} is not JSON with the field {field}.").format(
                        task=task.name, field=task.field or "-"
                    ),
                    file=sample.file,
                    line=sample.line,
                )
    return Asked(task, chosen, labels)


def ask(
    asked: Asked, systems: Sequence[System], renderer: Renderer, hardware: Hardware, on_progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Put a task to every system; returns its figures for evaluation.json and a row a sample for predictions.jsonl."""
    expected = [sample.answer.strip() for sample in asked.samples]
    answers: dict[str, list[str]] = {}
    figures: dict[str, Any] = {}
    for system in systems:
        started = time.perf_counter()
        with system.active(), torch.inference_mode(), hardware.autocast():
            answer = _likeliest if asked.task.kind == "classification" else _written
            answers[system.name] = answer(asked, system.model, renderer, hardware, on_progress)
        seconds = time.perf_counter() - started
        correct = mark(asked.task, expected, answers[system.name])
        figures[system.name] = {**shares(correct), "seconds": seconds}
        if asked.task.kind == "classification":
            figures[system.name] |= per_label(expected, answers[system.name], asked.labels)
    rows = [
        {
            "task": asked.task.name,
            "sample": number,
            "where": sample.where,
            "prompt": sample.prompt[-1].content if sample.prompt else "",
            "expected": expected[number],
            **{name: given[number] for name, given in answers.items()},
        }
        for number, sample in enumerate(asked.samples)
    ]
    result = {
        "name": asked.task.name,
        "kind": asked.task.kind,
        "samples": len(asked.samples),
        "systems": figures,
        **_difference(asked.task, expected, answers),
    }
    return result, rows


def mark(task: Task, expected: Sequence[str], answered: Sequence[str]) -> list[bool]:
    """Which answers are right."""
    if task.kind == "json":
        return [
            (found := _field(answer, task.field)) is not NOTHING and _same(found, _field(truth, task.field))
            for truth, answer in zip(expected, answered, strict=True)
        ]
    return [truth == answer.strip() for truth, answer in zip(expected, answered, strict=True)]


def _likeliest(
    asked: Asked, model: nn.Module, renderer: Renderer, hardware: Hardware, on_progress: Progress
) -> list[str]:
    """The label whose tokens, end of turn included, are the likeliest on average, for each sample.

    On average, because a sum prefers labels that the tokenizer happens to cut into fewer tokens.
    """
    scores = torch.zeros(len(asked.samples), len(asked.labels))
    rows = [renderer.answer(sample.prompt, label) for sample in asked.samples for label in asked.labels]
    lengths = [int(row.ids.size) for row in rows]
    _check_room(
        asked, [max(lengths[at : at + len(asked.labels)]) for at in range(0, len(rows), len(asked.labels))], model
    )
    packing = covers(model)
    batches = micro_batches(
        rows,
        range(len(rows)),
        budget=TOKENS_AT_ONCE.get(hardware.device.type, 2048),
        packing=packing,
        pad_id=renderer.tokenizer.pad_id,
    )
    with packed_attention(model, packing):
        for batch in batches:
            losses = token_losses(model, batch.to(hardware.device)).float().cpu()
            sums = torch.zeros(len(batch.samples)).index_add_(0, batch.owner, -losses)
            means = sums / torch.bincount(batch.owner, minlength=len(batch.samples))
            for place, index in enumerate(batch.samples):
                scores[index // len(asked.labels), index % len(asked.labels)] = means[place]
            on_progress(len(batch.samples))
    return [asked.labels[int(best)] for best in scores.argmax(dim=1)]


def _written(
    asked: Asked, model: nn.Module, renderer: Renderer, hardware: Hardware, on_progress: Progress
) -> list[str]:
    """What the model writes, greedily; prompts of like length are continued together.

    An answer is cut where the model's context ends.
    """
    prompts = [renderer.prompt(sample.prompt) for sample in asked.samples]
    _check_room(asked, [len(prompt) + 1 for prompt in prompts], model)
    answers = [""] * len(prompts)
    limit = limit_of(model) or max(map(len, prompts)) + asked.task.max_new_tokens
    longest = min(limit, max(map(len, prompts)) + asked.task.max_new_tokens)
    cache = CACHE_AT_ONCE.get(hardware.device.type, CACHE_AT_ONCE["cpu"])
    at_once = max(1, min(PROMPTS_AT_ONCE, cache // (longest * cache_bytes(model))))
    order = iter(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
    for group in _groups(order, at_once):
        room = limit - max(len(prompts[index]) for index in group)
        written = generate(
            model,
            [prompts[index] for index in group],
            end_ids=renderer.tokenizer.end_ids,
            pad_id=renderer.tokenizer.pad_id,
            max_new_tokens=min(asked.task.max_new_tokens, room),
        )
        for index, ids in zip(group, written, strict=True):
            answers[index] = renderer.tokenizer.decode(ids).strip()
        on_progress(len(group))
    return answers


def work(asked: Asked) -> int:
    """Units of progress that asking one system takes."""
    return len(asked.samples) * (len(asked.labels) or 1)


def _groups(items: Iterator[int], size: int) -> Iterator[list[int]]:
    while group := list(islice(items, size)):
        yield group


def _check_room(asked: Asked, lengths: Sequence[int], model: nn.Module) -> None:
    """Raises DataError for the first question that the model's context cannot hold with its answer."""
    limit = limit_of(model)
    for sample, length in zip(asked.samples, lengths, strict=True):
        if limit is not None and length > limit:
            raise DataError(
                _("This question of task {task} needs {length} tokens; the model was made for {limit}.").format(
                    task=asked.task.name, length=length, limit=limit
                ),
                file=sample.file,
                line=sample.line,
                hint=_("Shorten or remove it: a question that was cut would not measure the model."),
            )


NOTHING = object()
"""What a text holds that is no JSON object, or has not the field asked for. A field may be null, which is something."""


def _field(text: str, field: str | None) -> Any:
    """A top-level field of a JSON object, the whole object without one, or NOTHING."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOTHING
    if not isinstance(value, dict):
        return NOTHING
    return value if field is None else value.get(field, NOTHING)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values. To Python true equals 1, inside lists and objects too; to JSON it does not."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def _difference(task: Task, expected: Sequence[str], answers: dict[str, list[str]]) -> dict[str, Any]:
    """What changed from base to tuned, and one sentence that says whether that can be chance."""
    if not {"base", "tuned"} <= answers.keys():
        return {}
    base, tuned = (mark(task, expected, answers[name]) for name in ("base", "tuned"))
    fixed = sum(after and not before for before, after in zip(base, tuned, strict=True))
    broken = sum(before and not after for before, after in zip(base, tuned, strict=True))
    chance = mcnemar(fixed, broken)
    if chance >= LIKELY_CHANCE:
        verdict = _("No difference that chance would not explain (p = {chance:.2g}).")
    elif fixed > broken:
        verdict = _("Tuned is better: {fixed} answers fixed, {broken} broken (p = {chance:.2g}).")
    else:
        verdict = _("Tuned is worse: {fixed} answers fixed, {broken} broken (p = {chance:.2g}).")
    return {
        "fixed": fixed,
        "broken": broken,
        "p_value": chance,
        "verdict": verdict.format(fixed=fixed, broken=broken, chance=chance),
    }
