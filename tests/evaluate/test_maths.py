"""Maths answers: every reference verifies as right, every perturbed one as wrong; numbers in both conventions."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.data.files import BUNDLED_SETS
from afina.evaluate.measure import KINDS
from afina.evaluate.systems.asking import Answer
from afina.evaluate.tasks.kind import Asked
from afina.evaluate.tasks.maths import final_answer
from afina.evaluate.tasks.numbers import NUMBER, preferred, readings, steps
from afina.recipe.schema import Task


def marks(pairs: list[tuple[str, str]], **changes):
    """Marks of (reference, answer) pairs."""
    task = Task(name="t", kind="maths", data="-", **changes)
    samples = [Sample((Message("user", "?"), Message("assistant", gold)), Path("t"), 1) for gold, _answer in pairs]
    kind = KINDS["maths"]
    asked = kind.prepare(task, samples, Path())
    assert isinstance(asked, Asked)
    return kind.mark(asked, range(len(pairs)), [[Answer(answer)] for _gold, answer in pairs])


@pytest.mark.parametrize(
    "gold, answer, right, problem",
    [
        ("18", "She makes 9 * 2 = $18 a day.\n#### 18", True, ""),
        ("1234.5", "La respuesta es 1.234,5 euros.", True, ""),
        ("1234.5", "The answer is 1,234.5.", True, ""),
        ("1234", "Son 1.234 personas", True, ""),
        ("70000", "Ganó $70 000.", True, ""),
        ("70000", "$70,000.00", True, ""),
        ("12", "the answer is 13", False, ""),
        ("12", "12 apples, but the answer is 13", False, ""),
        ("0.5", "50%", True, ""),
        ("50", "50 %", True, ""),
        ("3/4", "so it is 0.75", True, ""),
        ("3/4", "0,75", True, ""),
        ("-3", "the result: −3", True, ""),
        ("-3", "3", False, ""),
        ("5", "", False, "empty"),
        ("5", "I do not know.", False, "no number"),
        ("5", "\\boxed{5}", True, ""),
        ("1234", "\\boxed{1{,}234}", True, ""),
        ("0.5", "\\boxed{\\frac{1}{2}}", True, ""),
        ("\\boxed{2\\sqrt{2}}", "\\boxed{\\sqrt{8}}", True, ""),
        ("\\boxed{2\\sqrt{2}}", "\\boxed{\\sqrt{7}}", False, ""),
        ("5", "9" * 5000, False, ""),
    ],
)
def test_answers_are_marked_by_what_they_state(gold, answer, right, problem):
    (mark,) = marks([(gold, answer)])
    assert (mark.right, mark.problem) == (right, problem)


def test_one_convention_is_one_reading():
    assert [mark.right for mark in marks([("1234", "1.234")], numbers="es")] == [True]
    assert [mark.right for mark in marks([("1234", "1.234")], numbers="en")] == [False]
    assert [mark.right for mark in marks([("1.234", "1.234")], numbers="en")] == [True]


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_numbers_are_read_as_they_are_written(digits, places):
    value = Fraction(digits, 10**places)
    whole, rest = divmod(abs(digits), 10**places)
    decimals = f"{rest:0{places}d}" if places else ""
    sign = "-" if digits < 0 else ""
    for thousands, point in ((",", "."), (".", ","), (" ", "."), ("", ".")):
        text = sign + f"{whole:,}".replace(",", thousands) + (point + decimals if decimals else "")
        found = NUMBER.fullmatch(text)
        assert found and value in readings(found)


def test_steps_are_checked_as_they_stand():
    text = "16 - 3 - 4 = <<16-3-4=9>>9 eggs. 9 * 2 = $18, and 10 x 3 = 31. 1.000,5 + 0,5 = 1.001. 10/3 = 3.33"
    assert steps(text) == [True, True, False, True, True]
    assert steps("1/6 × 1/6 = 1/36, 8/12 + 3/12 = 11/13. 2 + 4 = 6 / 2 = 3") == [True, False, True]
    assert steps("4080 + 4080 / 2 = 4080 + 2040 = 6120") == [True]  # the last of several equals
    assert steps("60 students x 2/3 = 40 students, 8 eggs + 2*3 = 14") == []  # not all of it is seen
    assert steps("x = 3, y = 4") == [] == steps("2 ** 9999999 = 4") == steps("__import__('os') = 1")


def perturbed(value: Fraction) -> list[str]:
    """The numbers that a wrong answer would state."""
    others = [
        value + 1,
        value - 1,
        value * 10 if value else value + 7,
        -value if value else value + 2,
        value + Fraction(1, 10),
    ]
    return [str(float(other)) if other.denominator > 1 else str(other.numerator) for other in others]


def test_the_bundled_exercises_are_right_to_each_step():
    rows = [
        json.loads(line)["messages"] for line in (BUNDLED_SETS / "maths-tutor" / "test.jsonl").open(encoding="utf-8")
    ]
    answers = [row[-1]["content"] for row in rows]
    found = marks([(answer, answer) for answer in answers])
    assert len(found) == 24 and all(mark.right for mark in found)
    assert all(mark.more["right_steps"] == mark.more["steps"] >= 1 for mark in found)
    others = [re.sub(r"[\d.]+(?=\D*$)", "777", answer) for answer in answers]
    assert not any(mark.right for mark in marks(list(zip(answers, others, strict=True))))


@pytest.mark.real
def test_every_reference_is_right_and_every_perturbed_one_wrong(real_data):
    """GSM8K's 8,792 solutions and MGSM's 500 answers: 100% and 0%."""
    pairs: list[tuple[str, str]] = []
    for name in ("train", "test"):
        for line in (real_data / f"data/gsm8k/{name}.jsonl").open(encoding="utf-8"):
            answer = json.loads(line)["answer"]
            pairs.append((answer, answer))
    for language, sentence in (("es", "La respuesta es {}."), ("en", "The answer is {}.")):
        for line in (real_data / f"data/mgsm/mgsm_{language}.tsv").read_text("utf-8").split("\n"):
            if line.strip():
                number = line.rpartition("\t")[2].strip()
                pairs.append((number, sentence.format(number)))
    assert len(pairs) == 7473 + 1319 + 500
    assert sum(bool(mark.right) for mark in marks(pairs)) == len(pairs)
    wrong = []
    for number, (gold, answer) in enumerate(pairs):
        stated = final_answer(answer).rstrip(".")
        value = preferred(stated)
        assert value is not None
        for other in perturbed(value)[number % 5 :: 5]:
            changed = re.sub(re.escape(stated) + r"(?!.*" + re.escape(stated) + ")", other, answer, flags=re.DOTALL)
            wrong.append((gold, changed))
    assert len(wrong) == len(pairs)
    assert sum(bool(mark.right) for mark in marks(wrong)) == 0
