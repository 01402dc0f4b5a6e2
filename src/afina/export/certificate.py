"""Is the exported file the model? Asked of the file itself, in the program that people will run it with.

`pose` has the model answer held-out prompts and notes what it thought at every token of its answers. `certify` puts
the same prompts to a GGUF file in real llama.cpp and compares: the ids of the prompt as the file's own template and
tokenizer make them, the ends of an answer, the distribution over the next token at each position of the answer, and
the answer itself. What differs more than its format may (`LIMITS`) raises ProofError.

Knows nothing of how the file was made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from afina.data.conversation import Sample
from afina.data.template import Renderer
from afina.errors import ProofError, ResourceError
from afina.export.divergence import distributions, divergence
from afina.language import _
from afina.model.generate import generate
from afina.model.llamacpp import LlamaCpp

ANSWER_TOKENS = 32
"""How far the answers are compared."""
TOP = 128
"""How many of the next tokens llama.cpp is asked for."""


SIGMAS = 3.0
"""A position is clear where the model prefers its token by more than this many standard deviations of what rounding
explains (see `noise`)."""
LEAST_NOISE = 0.02
"""Nats: below it lie sums of floats in another order, and llama.cpp's tables of F16."""


@dataclass(frozen=True)
class Limits:
    """What a format may differ by: `divergence` the mean KL in nats a token, `agreement` the least share of clear
    positions where both think the same token likeliest. Two and three bits err by more at some positions than at
    others, which a standard deviation does not tell."""

    divergence: float
    agreement: float = 0.95

    @property
    def tie(self) -> float:
        """Nats by which the model may prefer its own token where the file's answer first departs from its own."""
        return SIGMAS * noise(self.divergence)


def noise(divergence: float) -> float:
    """The standard deviation, in nats, of how much a divergence that small moves one token against another.

    Where log-probabilities are moved by a little, KL is half the variance of the movement; two tokens move apart by
    the root of two of one's deviation.
    """
    return max(LEAST_NOISE, 2 * math.sqrt(divergence))


EXACT, EIGHT, SIX = Limits(0.002), Limits(0.05), Limits(0.1)
FIVE, FOUR, THREE, TWO = Limits(0.2), Limits(0.5), Limits(1.0, 0.9), Limits(2.5, 0.8)
LIMITS: dict[str, Limits] = {
    "f32": EXACT,
    "f16": EXACT,
    "bf16": Limits(0.01),
    "q8_0": EIGHT,
    "q6_k": SIX,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), FIVE),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_xs", "mxfp4", "nf4"), FOUR),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), THREE),
    **dict.fromkeys(("q2_k", "q2_k_s"), TWO),
}
"""By format. Some ten times what was measured on small models, which suffer more from few bits than large ones; the
faults of docs/export.md are all far beyond those of q8_0."""


def limits_of(kind: str, exact: bool = True) -> Limits:
    """What a file in a format may differ by: at least what q8_0 may where llama.cpp's own arithmetic of such a model is
    not the model's (`exact` of write_gguf), in whatever format."""
    return LIMITS[kind] if exact else max(LIMITS[kind], EIGHT, key=lambda limits: limits.divergence)


Right = Callable[[Sample, str], bool]
"""Of a sample and an answer that was given: is it as good as the sample's own?"""


def the_same(sample: Sample, given: str) -> bool:
    """Whether an answer is the sample's own but for spaces around it."""
    return given.strip() == sample.answer.strip()


class NotTheModel(ProofError):
    """What was measured says that a file is not the model. `found` is its part of the certificate."""

    def __init__(self, message: str, found: dict[str, Any], hint: str) -> None:
        super().__init__(message, hint=hint)
        self.found = found


@dataclass(frozen=True)
class Question:
    """A prompt, and what the model makes of it. `answer` are its greedy ids without the end; `logprobs` (positions,
    vocab) its log-probabilities at each token of the answer and after the last."""

    sample: Sample
    prompt: list[int]
    answer: list[int]
    logprobs: np.ndarray

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


def pose(
    model: nn.Module, renderer: Renderer, samples: Sequence[Sample], tokens: int = ANSWER_TOKENS
) -> list[Question]:
    """Have the model answer the prompts of `samples`, greedily, and note its distributions."""
    tokenizer = renderer.tokenizer
    prompts = [renderer.prompt(sample.prompt) for sample in samples]
    answers = generate(model, prompts, end_ids=tokenizer.end_ids, pad_id=tokenizer.pad_id, max_new_tokens=tokens)
    noted = distributions(model, list(zip(prompts, answers, strict=True)))
    return [
        Question(sample, prompt, answer, logprobs)
        for sample, prompt, answer, logprobs in zip(samples, prompts, answers, noted, strict=True)
    ]


def certify(
    file: Path,
    kind: str,
    questions: Sequence[Question],
    renderer: Renderer,
    on_progress: Callable[[float], None] | None = None,
    right: Right = the_same,
    exact: bool = True,
) -> dict[str, Any]:
    """Compare a GGUF file with the model; returns its part of the certificate, `checks` with each answer. `right` says
    whether an answer is as good as the sample's own, `exact` whether llama.cpp computes such a model as it is.

    Prompts for which the file's context has no room are left out.

    Raises ProofError when it is not the model (NotTheModel where figures say so), ResourceError when there is no
    llama.cpp to ask, or nothing that it could be asked.
    """
    longest = max(len(question.prompt) for question in questions) + ANSWER_TOKENS
    divergences: list[float] = []
    agreed: list[bool] = []
    margins: list[float] = []
    checks: list[dict[str, Any]] = []
    with LlamaCpp(file, context=max(512, longest + 1), cache="f32") as witness:
        room = witness.context
        fitting = [question for question in questions if len(question.prompt) + ANSWER_TOKENS < room]
        if on_progress is not None:
            on_progress(len(questions) - len(fitting))
        if not fitting:
            raise ResourceError(
                _("no prompt leaves room for {tokens} tokens of an answer in its context of {room}").format(
                    tokens=ANSWER_TOKENS, room=room
                )
            )
        questions = fitting
        _check_ends(witness, questions[0], renderer, file)
        for question in questions:
            _check_prompt(witness, question, renderer, file)
            top = min(TOP, question.logprobs.shape[1])
            told = witness.logprobs(question.ids, top=top, start=len(question.prompt))
            divergences += [divergence(*pair) for pair in zip(question.logprobs, told, strict=True)]
            agreed += [
                int(ours.argmax()) == max(theirs, key=theirs.__getitem__)
                for ours, theirs in zip(question.logprobs, told, strict=True)
            ]
            margins += _margins(question.logprobs)
            checks.append(_answered(witness, question, renderer, right))
            if on_progress is not None:
                on_progress(1)
    return _judged(limits_of(kind, exact), file, divergences, agreed, margins, checks)


def certify_folder(
    folder: Path,
    kind: str,
    model: nn.Module,
    questions: Sequence[Question],
    renderer: Renderer,
    right: Right = the_same,
) -> dict[str, Any]:
    """The same of a model folder that was opened as `model`: its predictions, whole, and its answers by transformers.

    Raises NotTheModel.
    """
    tokenizer = renderer.tokenizer
    written = generate(
        model,
        [question.prompt for question in questions],
        end_ids=tokenizer.end_ids,
        pad_id=tokenizer.pad_id,
        max_new_tokens=ANSWER_TOKENS,
    )
    divergences: list[float] = []
    agreed: list[bool] = []
    margins: list[float] = []
    checks = []
    noted = distributions(model, [(question.prompt, question.answer) for question in questions])
    for question, ids, theirs in zip(questions, written, noted, strict=True):
        ours = question.logprobs
        divergences += np.maximum((np.exp(ours) * (ours - theirs)).sum(-1), 0.0).tolist()
        agreed += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        margins += _margins(ours)
        checks.append(_check(question, ids, tokenizer.decode(ids), renderer, right))
    return _judged(limits_of(kind), folder, divergences, agreed, margins, checks)


def _judged(
    limits: Limits,
    file: Path,
    divergences: Sequence[float],
    agreed: Sequence[bool],
    margins: Sequence[float],
    checks: list[dict[str, Any]],
) -> dict[str, Any]:
    """What was measured, as the certificate has it. Raises NotTheModel where it is beyond the limits."""
    found: dict[str, Any] = {
        "positions": len(divergences),
        "divergence": float(np.mean(divergences)),
        "divergence_p99": float(np.quantile(divergences, 0.99)),
        "divergence_max": float(np.max(divergences)),
        "agreement": float(np.mean(agreed)),
        **_clear(agreed, margins, SIGMAS * noise(min(float(np.mean(divergences)), limits.divergence))),
        "equal_answers": sum(check["equal"] for check in checks),
        "right_answers": {side: sum(check[f"{side}_right"] for check in checks) for side in ("model", "gguf")},
        "limits": vars(limits) | {"tie": limits.tie},
        "each": [round(value, 5) for value in divergences],
        "checks": checks,
    }
    _judge(found, limits, file)
    return found


def _margins(logprobs: np.ndarray) -> list[float]:
    """Nats by which each position's likeliest token is ahead of the next."""
    last = np.partition(logprobs, -2, axis=1)[:, -2:]
    found: list[float] = (last[:, 1] - last[:, 0]).tolist()
    return found


def _clear(agreed: Sequence[bool], margins: Sequence[float], margin: float) -> dict[str, Any]:
    """How many positions are clear, and the share of these where both think the same; None where there are none."""
    clear = [same for same, found in zip(agreed, margins, strict=True) if found > margin]
    return {
        "clear_margin": margin,
        "clear_positions": len(clear),
        "clear_agreement": float(np.mean(clear)) if clear else None,
    }


def _check_prompt(witness: LlamaCpp, question: Question, renderer: Renderer, file: Path) -> None:
    """The file's own template and tokenizer must give the ids that the model was trained with."""
    messages = [{"role": turn.role, "content": turn.content} for turn in question.sample.prompt]
    rendered = witness.apply_template(messages)
    seen = witness.tokenize(rendered, special=True, add_special=True)
    if seen == question.prompt:
        return
    bos = renderer.tokenizer.hf.bos_token_id
    if bos is not None and seen[:2] == [bos, bos]:
        raise ProofError(
            _("{file} would begin every prompt with two beginning-of-sequence tokens.").format(file=file.name),
            hint=_("The template writes one and the tokenizer adds one. Take it out of the template."),
        )
    raise ProofError(
        _("{file} would see another prompt than the one trained: {start}").format(file=file.name, start=rendered[:200]),
        hint=_("The chat template means something else to llama.cpp. Use another one (model.chat_template)."),
    )


def _check_ends(witness: LlamaCpp, question: Question, renderer: Renderer, file: Path) -> None:
    """Each token that ends an answer here must end one there, and an ordinary one must not."""
    tokenizer = renderer.tokenizer
    for index in tokenizer.end_ids:
        if not witness.ends_at(question.prompt, index):
            raise ProofError(
                _("{file} would not stop where the model's answer ends: {token}.").format(
                    file=file.name, token=tokenizer.hf.convert_ids_to_tokens(index)
                ),
                hint=_("Nothing was kept. Please report this with the model's name."),
            )
    letter = witness.tokenize("a", False)[-1]
    if letter not in tokenizer.end_ids and witness.ends_at(question.prompt, letter):
        raise ProofError(
            _("{file} would stop in the middle of an answer.").format(file=file.name),
            hint=_("Nothing was kept. Please report this with the model's name."),
        )


def _answered(witness: LlamaCpp, question: Question, renderer: Renderer, right: Right) -> dict[str, Any]:
    """The file's own greedy answer beside the model's."""
    written = witness.complete(question.prompt, max_new_tokens=ANSWER_TOKENS)
    return _check(question, written.ids, written.text, renderer, right)


def _check(question: Question, ids: list[int], text: str, renderer: Renderer, right: Right) -> dict[str, Any]:
    ours = renderer.tokenizer.decode(question.answer)
    return {
        "prompt": question.sample.prompt[-1].content,
        "model": ours,
        "gguf": text,
        "equal": text.strip() == ours.strip(),
        "gap": _gap(question, ids),
        "model_right": right(question.sample, ours),
        "gguf_right": right(question.sample, text),
    }


def _gap(question: Question, theirs: list[int]) -> float:
    """Nats by which the model prefers its own token where `theirs` first departs from its greedy answer; else 0."""
    ours = question.answer
    same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    if same >= len(theirs) or same >= len(question.logprobs):
        return 0.0
    row = question.logprobs[same]
    return float(row.max() - row[theirs[same]])


def _judge(found: dict[str, Any], limits: Limits, file: Path) -> None:
    checks = found["checks"]
    hint = _("Nothing was kept. Please report this with the model's name.")
    if limits.divergence >= FOUR.divergence:
        hint = _("Export with more bits, or with export.imatrix: true.")
    if found["divergence"] > limits.divergence:
        raise NotTheModel(
            _("{file} is not the model: its predictions are {divergence:.3g} nats away (allowed {most:.3g}).").format(
                file=file.name, divergence=found["divergence"], most=limits.divergence
            ),
            found,
            hint,
        )
    if found["clear_positions"] and found["clear_agreement"] < limits.agreement:
        raise NotTheModel(
            _(
                "{file} is not the model: of {count} tokens that it is sure of, the file agrees on {agreement:.0%} (at "
                "least {least:.0%})."
            ).format(
                file=file.name,
                count=found["clear_positions"],
                agreement=found["clear_agreement"],
                least=limits.agreement,
            ),
            found,
            hint,
        )
    different = sum(not check["equal"] and check["gap"] > limits.tie for check in checks)
    if different:
        raise NotTheModel(
            _("{count} of {all} answers of {file} are not the model's.").format(
                count=different, all=len(checks), file=file.name
            ),
            found,
            hint,
        )
