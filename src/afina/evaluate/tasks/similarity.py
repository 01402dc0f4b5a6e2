"""similarity: how like the reference a text is, by letters (chrF) and by words (ROUGE). Likeness is not rightness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.errors import DataError, ResourceError
from afina.evaluate.systems.asking import Answer, Request, Write
from afina.evaluate.tasks.json_object import NOTHING, field_of
from afina.evaluate.tasks.kind import CUT_OFF, EMPTY, NOT_JSON, Asked, Mark, one_each
from afina.evaluate.tasks.text import normalised
from afina.language import _
from afina.recipe.schema import Task

ROUGE = ("rouge1", "rouge2", "rougeL")


class Similarity:
    """chrF (Popović, 2015) of each answer, or of one field of its JSON, as its score; ROUGE (Lin, 2004) beside it."""

    measure, reads = "chrF", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Any reference will do; where a field is compared, each must be JSON with a text there."""
        _scorers()
        for sample in samples:
            if _compared(sample.answer, task.field) is None:
                raise DataError(
                    _("The reference answer of task {task} is not JSON with a text in the field {field}.").format(
                        task=task.name, field=task.field
                    ),
                    file=sample.file,
                    line=sample.line,
                )
        return Asked(task, samples)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One answer, greedily."""
        return [Write(asked.samples[place].prompt, asked.task.max_new_tokens)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Scores from 0 to 1; an empty answer has 0, and is counted as empty."""
        chrf, rouge = _scorers()

        def one(sample: Sample, answer: Answer) -> Mark:
            found, wanted = _compared(answer.text, asked.task.field), _compared(sample.answer, asked.task.field) or ""
            letters = chrf.sentence_score(found or "", [wanted]).score / 100
            words = rouge.score(wanted, found or "")
            problem = EMPTY if not answer.text.strip() else "" if answer.ended else CUT_OFF
            if found is None and not problem:
                problem = NOT_JSON
            more = {"found": found or "", **{name: float(words[name].fmeasure) for name in ROUGE}}
            return Mark(None, letters, answer.text, problem, more)

        return one_each(one, asked, places, answers)

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """Means of ROUGE's F, and chrF of the corpus as a whole."""
        found: dict[str, Any] = {
            name: sum(mark.more[name] for mark in marks) / len(marks) if marks else 0.0 for name in ROUGE
        }
        if marks:
            chrf, _rouge = _scorers()
            references = [_compared(asked.samples[place].answer, asked.task.field) or "" for place in places]
            given = [mark.more["found"] for mark in marks]
            found["chrf_corpus"] = chrf.corpus_score(given, [references]).score / 100
        return found


def _compared(text: str, field: str | None) -> str | None:
    """What is compared: the text itself, or the text in a field of its JSON object; None where there is none."""
    value = text if field is None else field_of(text, field)
    return value if value is not NOTHING and isinstance(value, str) else None


class _Words:
    """Words of any language: rouge-score's own tokenizer drops every letter with an accent."""

    def tokenize(self, text: str) -> list[str]:
        return normalised(text).split()


def _scorers() -> tuple[Any, Any]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ResourceError(
            _("Comparing texts needs the packages sacrebleu and rouge-score, which are not installed."),
            hint=_('Run: pip install "afina[eval]"'),
        ) from error
    return CHRF(), RougeScorer(list(ROUGE), tokenizer=_Words())
