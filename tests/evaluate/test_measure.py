"""Tasks put to small models: the likeliest label is that of float64, whoever is asked beside, counted and compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from journey.tiny import save_base
from small import CPU, llama

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import DataError
from afina.evaluate.answers import Answers, Clock
from afina.evaluate.measure import ROUND, Sitting, prepare, work
from afina.evaluate.systems import transformer
from afina.evaluate.systems.asking import Answer, Answering, Request, Sink, System
from afina.evaluate.systems.transformer import ModelAnswering
from afina.model.generate import generate
from afina.recipe.schema import Task


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    return Renderer(load_tokenizer(str(save_base(tmp_path_factory.mktemp("base")))))


def sample(question: str, answer: str, line: int = 1) -> Sample:
    return Sample((Message("user", question), Message("assistant", answer)), Path("t.jsonl"), line)


def task(kind: str, **changes) -> Task:
    return Task(**{"name": "t", "kind": kind, "data": "t.jsonl", **changes})


def model_for(renderer: Renderer, seed: int = 0, **changes):
    return llama(seed, vocab_size=len(renderer.tokenizer.hf), **changes)


def system(name: str, model, renderer, identity: str = "") -> System:
    @contextmanager
    def opened() -> Iterator[Answering]:
        yield ModelAnswering(model, renderer, CPU, nullcontext)

    return System(name, "model", identity or name, opened)


def ask(asked, systems, folder, **changes):
    """The task's figures and rows, with the sitting."""
    with Answers(folder / "answers.jsonl") as answers:
        sitting = Sitting(systems, [asked], answers, **changes)
        sitting.ask()
        results, rows = sitting.results()
    return results[0], rows


QUESTIONS = ["Is it good?", "no", "¿Y esto qué es?", "A longer question, with a second clause and a third one.", "x"]
CHOICES = ["p", "q", "z", "é!"]


@pytest.mark.parametrize("packed", [True, False])
def test_label_likelihood_is_that_of_one_by_one_in_float64(renderer, packed, monkeypatch, tmp_path):
    """The likeliest label, end of turn included, against log-softmax averaged token by token."""
    model = model_for(renderer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # so that the answer depends on the question
    if not packed:
        monkeypatch.setattr(transformer, "covers", lambda model: False)
    samples = [sample(question, CHOICES[number % 4]) for number, question in enumerate(QUESTIONS)]
    wanted = []
    for one in samples:
        scores = []
        for label in CHOICES:
            row = renderer.answer(one.prompt, label)
            ids = torch.from_numpy(row.ids).long()
            logits = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
            found = [logits[at - 1, ids[at]].item() for at in range(1, len(ids)) if row.learnt[at]]
            scores.append(sum(found) / len(found))
        wanted.append(CHOICES[scores.index(max(scores))])
        gaps = sorted(scores, reverse=True)
        assert gaps[0] - gaps[1] > 1e-3  # no tie that rounding could break
    asked = prepare(task("classification", labels=CHOICES), samples, seed=0)
    _result, rows = ask(asked, [system("base", model, renderer)], tmp_path)
    assert [row["base"] for row in rows] == wanted
    assert len(set(wanted)) > 1  # a model that always says the same would prove little


@pytest.mark.parametrize("kind", ["classification", "exact", "maths", "json", "similarity", "perplexity", "forgetting"])
def test_two_equal_systems_do_not_differ(renderer, tmp_path, kind):
    model = model_for(renderer, max_position_embeddings=512)
    answer = '{"a": 1}' if kind == "json" else None
    samples = [sample(question, answer or CHOICES[number % 4]) for number, question in enumerate(QUESTIONS)]
    changes = {"data": None, "limit": 5} if kind == "forgetting" else {}
    asked = prepare(task(kind, max_new_tokens=4, **changes), samples, seed=0)
    result, rows = ask(asked, [system("base", model, renderer), system("tuned", model, renderer)], tmp_path)
    assert result["p_value"] == 1.0 and result["verdict"].startswith("No difference")
    assert all(row["base"] == row["tuned"] for row in rows)
    assert result["systems"]["base"]["value"] == result["systems"]["tuned"]["value"] is not None


@pytest.mark.parametrize(("kind", "told"), [("perplexity", False), ("similarity", True)])
def test_the_interval_of_a_single_sample_is_none_or_wide(renderer, tmp_path, kind, told):
    """It was a point: the one sample, drawn again and again."""
    asked = prepare(task(kind, max_new_tokens=4), [sample("a", "some words")], seed=0)
    result, _rows = ask(asked, [system("tuned", model_for(renderer), renderer)], tmp_path)
    ends = result["systems"]["tuned"]["interval"]
    assert (ends is not None and ends[1] - ends[0] > 0.5) if told else ends is None


def test_one_system_alone_has_no_verdict(renderer, tmp_path):
    asked = prepare(task("exact", max_new_tokens=2), [sample("a", "b")], seed=0)
    result, _rows = ask(asked, [system("tuned", model_for(renderer), renderer)], tmp_path)
    assert "verdict" not in result and result["samples"] == 1


class _Silent:
    """Answers nothing, at once."""

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        for place, _request in enumerate(requests):
            sink(place, Answer(error="gone", seconds=1e-6))


def test_who_answers_nothing_has_no_speed(tmp_path):
    asked = prepare(task("exact"), [sample(question, "x") for question in QUESTIONS], seed=0)
    silent = System("gone", "endpoint", "gone", lambda: nullcontext(_Silent()))
    result, rows = ask(asked, [silent], tmp_path)
    figures = result["systems"]["gone"]
    assert figures["samples_per_second"] is None is figures["tokens_per_second"] and figures["value"] is None
    assert figures["unanswered"] == len(QUESTIONS) and all(row["unanswered"] == {"gone": "gone"} for row in rows)


def test_written_answers_do_not_depend_on_who_is_asked_beside(renderer, tmp_path):
    model = model_for(renderer)
    samples = [sample(question, "x") for question in QUESTIONS]
    base = [system("base", model, renderer)]
    together = ask(prepare(task("exact", max_new_tokens=9), samples, 0), base, tmp_path / "all")[1]
    for number, one in enumerate(samples):
        alone = ask(prepare(task("exact", max_new_tokens=9), [one], 0), base, tmp_path / str(number))[1]
        assert alone[0]["base"] == together[number]["base"]
        ids = renderer.prompt(one.prompt)
        end = renderer.tokenizer.end_ids
        plain = generate(model, [ids], end_ids=end, pad_id=0, max_new_tokens=9)[0]
        assert together[number]["base"] == renderer.tokenizer.decode(plain).strip()


def test_work_is_what_progress_reports(renderer, tmp_path):
    systems = [system("base", model_for(renderer), renderer), system("tuned", model_for(renderer, 1), renderer)]
    for kind in ("classification", "exact"):
        asked = prepare(task(kind, max_new_tokens=2), [sample(q, "yes" if len(q) > 3 else "no") for q in QUESTIONS], 0)
        for folder in ("new", "new"):  # the second time all is remembered
            done: list[float] = []
            ask(asked, systems, tmp_path / folder / kind, on_progress=done.append)
            assert sum(done) == pytest.approx(2 * work(asked))


def test_a_limit_takes_the_same_samples_in_any_order():
    samples = [sample(f"q{number}", "a", number) for number in range(50)]
    chosen = prepare(task("exact", limit=7), samples, seed=3).samples
    again = prepare(task("exact", limit=7), samples[::-1], seed=3).samples
    assert [one.line for one in chosen] == [one.line for one in again]
    assert len(chosen) == 7
    assert [one.line for one in prepare(task("exact", limit=7), samples, seed=4).samples] != [s.line for s in chosen]
    assert len(prepare(task("exact", limit=99), samples, seed=3).samples) == 50


def test_an_answer_that_is_no_label_is_named():
    with pytest.raises(DataError, match="perhaps") as caught:
        prepare(task("classification", labels=["yes", "no"]), [sample("a", "yes"), sample("b", "perhaps", 7)], 0)
    assert caught.value.line == 7 and "yes, no" in caught.value.hint


class Scripted:
    """A system that answers from a table and counts what it was asked; it may fail, stop, or be interrupted."""

    def __init__(self, name: str, answers: Sequence[str], stop_after: int = 10**9) -> None:
        self.name, self.answers, self.stop_after, self.asked = name, answers, stop_after, 0

    def system(self, kind: str = "model") -> System:
        @contextmanager
        def opened() -> Iterator[Answering]:
            yield self

        return System(self.name, kind, self.name, opened)  # type: ignore[arg-type]

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        for place, request in enumerate(requests):
            if self.asked >= self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            text = self.answers[int(request.messages[0].content.split()[0]) % len(self.answers)]
            error = text.removeprefix("!") if text.startswith("!") else ""
            sink(place, Answer("" if error else text, 1, True, 0.01, error=error))


def numbered(count: int) -> list[Sample]:
    return [sample(f"{number} is asked", "yes", number + 1) for number in range(count)]


def test_what_was_answered_is_not_asked_again(tmp_path):
    asked = prepare(task("exact"), numbered(10), 0)
    first, second = Scripted("first", ["yes"]), Scripted("second", ["yes", "no"])
    ask(asked, [first.system()], tmp_path)
    assert first.asked == 10
    result, _rows = ask(asked, [first.system(), second.system()], tmp_path)
    assert (first.asked, second.asked) == (10, 10) and result["systems"]["first"]["correct"] == 10
    more = prepare(task("exact"), [*numbered(10), sample("11 is new", "yes")], 0)
    ask(more, [first.system(), second.system()], tmp_path)
    assert (first.asked, second.asked) == (11, 11)


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    asked = prepare(task("exact"), numbered(10), 0)
    killed = Scripted("one", ["yes", "no"], stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        ask(asked, [killed.system()], tmp_path)
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    again = Scripted("one", ["yes", "no"])
    result, _rows = ask(asked, [again.system()], tmp_path)
    assert again.asked == 4 and result["systems"]["one"]["correct"] == 5
    ask(asked, [again.system()], tmp_path)
    assert again.asked == 4  # the torn line took none of the new ones along


@pytest.mark.parametrize("kind", ["classification", "perplexity"])
def test_what_was_read_is_kept_when_the_rest_is_not(renderer, tmp_path, monkeypatch, kind):
    """Answers by likelihood are kept as they come: a kill in the middle of a large task must not cost all of it."""
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", {"cpu": 32})
    asked = prepare(task(kind, **({"labels": CHOICES} if kind == "classification" else {})),
                    [sample(f"{number}?", CHOICES[number % 4]) for number in range(40)], 0)  # fmt: skip
    one, judged, calls = system("one", model_for(renderer), renderer), transformer.judged, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return judged(*arguments)

    monkeypatch.setattr(transformer, "judged", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(asked, [one], tmp_path)
    kept = len((tmp_path / "answers.jsonl").read_bytes().splitlines())
    assert 0 < kept < 40
    monkeypatch.setattr(transformer, "judged", judged)
    whole, rows = ask(asked, [one], tmp_path)
    fresh, others = ask(asked, [system("one", model_for(renderer), renderer)], tmp_path / "fresh")
    assert rows == others and whole["systems"]["one"]["value"] == pytest.approx(fresh["systems"]["one"]["value"])


@pytest.mark.parametrize("kind", ["classification", "exact", "json", "perplexity", "similarity"])
@pytest.mark.parametrize("decide", ["likelihood", "constrained"])
def test_a_model_that_computes_no_number_has_no_answer(renderer, tmp_path, kind, decide):
    model = model_for(renderer)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    answer = '{"a": 1}' if kind == "json" else None
    samples = [sample(question, answer or CHOICES[number % 4]) for number, question in enumerate(QUESTIONS)]
    asked = prepare(task(kind, max_new_tokens=4, decide=decide), samples, 0)
    result, _rows = ask(asked, [system("broken", model, renderer)], tmp_path)
    figures = result["systems"]["broken"]
    assert figures["value"] is None and figures["unanswered"] == len(QUESTIONS)
    assert figures["reasons"] == ["What the model computes is no number."]


def test_who_gives_no_answer_is_counted_and_compared_on_the_rest(tmp_path):
    asked = prepare(task("exact"), numbered(8), 0)
    sound, gone = Scripted("sound", ["yes"]), Scripted("gone", ["yes", "!it went away", "no", ""])
    result, rows = ask(asked, [sound.system(), gone.system()], tmp_path)
    figures = result["systems"]["gone"]
    assert (figures["answered"], figures["unanswered"], figures["reasons"]) == (6, 2, ["it went away"])
    assert figures["problems"] == {"empty": 2} and figures["correct"] == 2 and figures["accuracy"] == 2 / 6
    assert result["comparisons"][0]["samples"] == 6 and result["broken"] == 4
    assert rows[1]["unanswered"] == {"gone": "it went away"} and "gone" not in rows[1]["right"]
    dead = Scripted("dead", ["!nobody there"])
    result, _rows = ask(asked, [sound.system(), dead.system()], tmp_path)
    assert result["systems"]["dead"]["value"] is None
    assert result["verdict"] == "No sample was answered by both."


def test_within_a_limit_of_time_all_are_asked_the_same(tmp_path):
    class Twice(Clock):
        """Time for two rounds."""

        def __init__(self) -> None:
            super().__init__(1000.0)
            self.looks = 0

        def is_over(self) -> bool:
            self.looks += 1
            return self.looks > 2

    asked = prepare(task("exact"), numbered(3 * ROUND), 0)
    one, two = Scripted("one", ["yes"]), Scripted("two", ["yes", "no"])
    result, rows = ask(asked, [one.system(), two.system()], tmp_path, clock=Twice())
    assert one.asked == two.asked == 2 * ROUND
    assert result["systems"]["two"]["unasked"] == ROUND and result["comparisons"][0]["samples"] == 2 * ROUND
    assert rows[-1]["unanswered"].keys() == {"one", "two"}


def test_a_prompt_longer_than_the_context_is_counted(renderer, tmp_path):
    model = model_for(renderer, max_position_embeddings=64)
    for kind in ("exact", "classification", "perplexity"):
        asked = prepare(task(kind), [sample("short", "a", 1), sample("word " * 80, "b", 9)], 0)
        result, _rows = ask(asked, [system("base", model, renderer)], tmp_path / kind)
        figures = result["systems"]["base"]
        assert (figures["answered"], figures["unanswered"]) == (1, 1) and "64" in figures["reasons"][0]
