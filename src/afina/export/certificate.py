"""Is the exported file the model? Asked of the file itself, in the program that people will run it with.

`pose` has the model answer held-out prompts and notes what it thought at every token of its answers. `certify` puts
the same prompts to a GGUF file in real llama.cpp and compares: the ids of the prompt as the file's own template and
tokenizer make them, the ends of an answer, the distribution over the next token at each position of the answer, and
the answer itself. What differs more than its format may (`LIMITS`) raises ProofError.

The divergence is KL(model || file), in nats a token. llama.cpp tells the likeliest TOP tokens with their
log-probabilities over the whole vocabulary; the model's distribution is whole. Tokens that llama.cpp does not tell
count as one token, whose probability is what is left to one on each side. Joining tokens can only lower a divergence
(the data-processing inequality), so the figure is a lower bound, and exact where TOP is the whole vocabulary. Knows
nothing of how the file was made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from afina.data.conversation import Sample
from afina.data.template import Renderer
from afina.errors import ProofError
from afina.language import _
from afina.model.generate import generate
from afina.model.llamacpp import LlamaCpp, _request

ANSWER_TOKENS = 32
"""How far the answers are compared."""
TOP = 128
"""How many of the next tokens llama.cpp is asked for."""
LEFT = 1e-9
"""The least that counts as left to the tokens that were not told; below it are roundings of a sum of floats."""


@dataclass(frozen=True)
class Limits:
    """What a format may differ by: `divergence` the mean KL in nats a token, `agreement` the least share of positions
    where both think the same token likeliest, `tie` the nats by which the model may prefer its own token where the
    file's answer first departs from its own."""

    divergence: float
    agreement: float
    tie: float


EXACT, EIGHT, SIX = Limits(0.002, 0.97, 0.05), Limits(0.05, 0.85, 1.0), Limits(0.1, 0.8, 1.5)
FIVE, FOUR, THREE, TWO = Limits(0.2, 0.75, 3.0), Limits(0.5, 0.5, 6.0), Limits(1.0, 0.4, 12.0), Limits(2.5, 0.2, 100.0)
LIMITS: dict[str, Limits] = {
    "f32": EXACT,
    "f16": EXACT,
    "bf16": Limits(0.01, 0.96, 0.5),
    "q8_0": EIGHT,
    "q6_k": SIX,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), FIVE),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_xs", "mxfp4"), FOUR),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), THREE),
    **dict.fromkeys(("q2_k", "q2_k_s"), TWO),
}
"""By format. Some ten times what was measured on small models, which suffer more from few bits than large ones; the
faults of docs/export.md are all far beyond those of q8_0."""


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
    return [
        Question(sample, prompt, answer, distributions(model, prompt, answer))
        for sample, prompt, answer in zip(samples, prompts, answers, strict=True)
    ]


@torch.inference_mode()
def distributions(model: nn.Module, prompt: list[int], answer: list[int]) -> np.ndarray:
    """(len(answer) + 1, vocab) natural log-probabilities, in F32."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=device)).logits[0, len(prompt) - 1 :]
    found: np.ndarray = torch.log_softmax(logits.float(), -1).cpu().numpy()
    return found


class Witness(LlamaCpp):
    """A GGUF file in llama.cpp, asked what it thinks of an answer."""

    def next_logprobs(self, ids: Sequence[int], start: int, top: int) -> list[dict[int, float]]:
        """Entry i: log-probabilities of the `top` likeliest tokens after ids[: start + i]."""
        # The bias touches the choice, not the log-probabilities: see LlamaCpp.logprobs.
        harmless = self.tokenize("a", False)[-1]
        found = []
        for end in range(start, len(ids) + 1):
            body = _request(ids[:end], 1, 0.0, 1.0, 0, (), True)
            body |= {"stream": False, "n_probs": top, "logit_bias": [[harmless, 1e9]]}
            entries = self._call("POST", "/completion", body)["completion_probabilities"][0]["top_logprobs"]
            found.append({int(entry["id"]): float(entry["logprob"]) for entry in entries})
        return found

    def ends_at(self, ids: Sequence[int], token: int) -> bool:
        """Whether an answer is over when the model says `token`."""
        body = _request(ids, 2, 0.0, 1.0, 0, (), True) | {"stream": False, "logit_bias": [[token, 1e9]]}
        return bool(self._call("POST", "/completion", body)["stop_type"] == "eos")


def divergence(ours: np.ndarray, theirs: dict[int, float]) -> float:
    """KL(ours || theirs) in nats, the tokens that `theirs` lacks joined to one."""
    index = np.fromiter(theirs, np.int64)
    ours_told, theirs_told = ours[index].astype(np.float64), np.fromiter(theirs.values(), np.float64)
    told = float(np.sum(np.exp(ours_told) * (ours_told - theirs_told)))
    left, left_there = (max(1.0 - float(np.exp(values).sum()), LEFT) for values in (ours_told, theirs_told))
    if len(theirs) >= len(ours):
        return max(told, 0.0)
    return max(told + left * math.log(left / left_there), 0.0)


def certify(
    file: Path,
    kind: str,
    questions: Sequence[Question],
    renderer: Renderer,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Compare a GGUF file with the model; returns its part of the certificate, `checks` with each answer.

    Raises ProofError when it is not the model, ResourceError when there is no llama.cpp to ask.
    """
    longest = max(len(question.ids) for question in questions)
    divergences: list[float] = []
    agreed: list[bool] = []
    checks: list[dict[str, Any]] = []
    with Witness(file, context=max(512, longest + ANSWER_TOKENS), cache="f32") as witness:
        _check_ends(witness, questions[0], renderer, file)
        for question in questions:
            _check_prompt(witness, question, renderer, file)
            top = min(TOP, question.logprobs.shape[1])
            told = witness.next_logprobs(question.ids, len(question.prompt), top)
            divergences += [divergence(*pair) for pair in zip(question.logprobs, told, strict=True)]
            agreed += [
                int(ours.argmax()) == max(theirs, key=theirs.__getitem__)
                for ours, theirs in zip(question.logprobs, told, strict=True)
            ]
            checks.append(_answered(witness, question, renderer))
            if on_progress is not None:
                on_progress(1)
    found: dict[str, Any] = {
        "positions": len(divergences),
        "divergence": float(np.mean(divergences)),
        "divergence_p99": float(np.quantile(divergences, 0.99)),
        "divergence_max": float(np.max(divergences)),
        "agreement": float(np.mean(agreed)),
        "equal_answers": sum(check["equal"] for check in checks),
        "right_answers": {side: sum(check[f"{side}_right"] for check in checks) for side in ("model", "gguf")},
        "limits": vars(LIMITS[kind]),
        "checks": checks,
    }
    _judge(found, kind, file)
    return found


def _check_prompt(witness: Witness, question: Question, renderer: Renderer, file: Path) -> None:
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


def _check_ends(witness: Witness, question: Question, renderer: Renderer, file: Path) -> None:
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


def _answered(witness: Witness, question: Question, renderer: Renderer) -> dict[str, Any]:
    """The file's own greedy answer beside the model's."""
    written = witness.complete(question.prompt, max_new_tokens=ANSWER_TOKENS)
    ours = renderer.tokenizer.decode(question.answer)
    reference = question.sample.answer.strip()
    return {
        "prompt": question.sample.prompt[-1].content,
        "model": ours,
        "gguf": written.text,
        "equal": written.text.strip() == ours.strip(),
        "gap": _gap(question, written.ids),
        "model_right": ours.strip() == reference,
        "gguf_right": written.text.strip() == reference,
    }


def _gap(question: Question, theirs: list[int]) -> float:
    """Nats by which the model prefers its own token where `theirs` first departs from its greedy answer; else 0."""
    ours = question.answer
    same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    if same >= len(theirs) or same >= len(question.logprobs):
        return 0.0
    row = question.logprobs[same]
    return float(row.max() - row[theirs[same]])


def _judge(found: dict[str, Any], kind: str, file: Path) -> None:
    limits, checks = LIMITS[kind], found["checks"]
    hint = _("Nothing was kept. Please report this with the model's name.")
    if found["divergence"] > limits.divergence or found["agreement"] < limits.agreement:
        raise ProofError(
            _(
                "{file} is not the model: its predictions are {divergence:.3g} nats away (allowed {most:.3g}), and it "
                "agrees on {agreement:.0%} of the tokens (at least {least:.0%})."
            ).format(
                file=file.name,
                divergence=found["divergence"],
                most=limits.divergence,
                agreement=found["agreement"],
                least=limits.agreement,
            ),
            hint=hint
            if limits.divergence < FOUR.divergence
            else _("Export with more bits, or with export.imatrix: true."),
        )
    different = sum(not check["equal"] and check["gap"] > limits.tie for check in checks)
    if different:
        raise ProofError(
            _("{count} of {all} answers of {file} are not the model's.").format(
                count=different, all=len(checks), file=file.name
            ),
            hint=hint,
        )
