"""A judge that is an endpoint of our own, or a model: both orders, ties, nonsense, and one that goes away."""

import json
import threading
import time
from collections import Counter
from contextlib import nullcontext

import pytest
from endpoint_server import Server, completion
from journey.tiny import save_base
from small import CPU

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.evaluate.answers import Answers, Clock
from afina.evaluate.measure import ROUND, Sitting, prepare, work
from afina.evaluate.systems.asking import Answer, System, Write
from afina.evaluate.systems.endpoint import EndpointAnswering
from afina.evaluate.systems.transformer import ModelAnswering
from afina.evaluate.tasks.judge import verdict
from afina.model.endpoint import Endpoint
from afina.model.load import load_model
from afina.recipe.schema import Task

TASK = Task(name="liking", kind="judge", data="-", judge="the judge", max_new_tokens=8)


class Says:
    """A system that gives one answer to each question."""

    def __init__(self, name: str, *answers: str) -> None:
        self.name, self.answers = name, answers

    def system(self) -> System:
        return System(self.name, "model", f"{self.name} {self.answers}", lambda: nullcontext(self))

    def answer(self, requests, sink) -> None:
        for place, request in enumerate(requests):
            assert isinstance(request, Write)
            text = self.answers[int(request.messages[0].content) % len(self.answers)]
            sink(place, Answer(error=text[1:]) if text.startswith("!") else Answer(text, 3))


def samples(count: int) -> list[Sample]:
    return [Sample((Message("user", f"{number}"), Message("assistant", "yes")), "-", number) for number in range(count)]


def endpoint(server: Server, **more) -> System:
    point = Endpoint(server.url, "judge", patience=(), **more)
    return System("judge", "endpoint", "judge", lambda: nullcontext(EndpointAnswering(point)), reads=False)


def judged_by(judge, tmp_path, count=8, systems=None, **more):
    asked = prepare(TASK, samples(count), 0)
    systems = systems or [Says("base", "short"), Says("tuned", "a longer answer")]
    done: list[float] = []
    sitting = Sitting(
        [one.system() for one in systems],
        [asked],
        Answers(tmp_path / "answers.jsonl"),
        done.append,
        open_judge=lambda task: judge,
        **more,
    )
    sitting.ask()
    (result,), rows = sitting.results()
    assert sum(done) == pytest.approx(work(asked, len(systems)))
    return result, rows


def shown(body: dict) -> tuple[str, str]:
    """The two answers that the judge sees, in its order."""
    text = body["messages"][-1]["content"]
    first, second = text.split("[Answer A]\n")[1].split("\n\nWhich answer")[0].split("\n\n[Answer B]\n")
    return first, second


def test_a_judge_who_likes_length_prefers_the_longer_in_both_orders(serve, tmp_path):
    def longer(body):
        first, second = shown(body)
        return completion("Because it says more.\n[[A]]" if len(first) > len(second) else "So be it: [[B]]")

    server = serve(longer)
    result, rows = judged_by(endpoint(server), tmp_path)
    tuned = result["systems"]["tuned"]
    assert (tuned["wins"], tuned["ties"], tuned["losses"], tuned["order_decided"]) == (8, 0, 0, 0)
    assert tuned["value"] == 1.0 and tuned["answered"] == 8 and result["measure"] == "preference"
    assert "tuned is better than base" in result["verdict"]
    orders = Counter(shown(body) for body in server.seen)
    assert orders == {("short", "a longer answer"): 8, ("a longer answer", "short"): 8}
    assert rows[0]["scores"] == {"base": 0.5, "tuned": 1.0}
    judged_by(endpoint(server), tmp_path)
    assert len(server.seen) == 16  # what the judge said is remembered too


def test_a_judge_who_likes_the_first_place_decides_nothing(serve, tmp_path):
    result, _rows = judged_by(endpoint(serve(lambda body: completion("[[A]]"))), tmp_path)
    tuned = result["systems"]["tuned"]
    assert (tuned["wins"], tuned["ties"], tuned["losses"], tuned["order_decided"]) == (0, 8, 0, 8)
    assert tuned["value"] == 0.5 and "No difference" in result["verdict"]


def test_ties_are_ties_and_half_a_preference_is_half(serve, tmp_path):
    """Of even samples both orders say neither; of odd ones one says neither, the other prefers base."""

    def reply(body):
        even = int(body["messages"][-1]["content"].split("[Question]\n")[1].split("\n")[0]) % 2 == 0
        return completion("[[C]]" if even or shown(body)[0] != "short" else "[[A]]")

    tuned = judged_by(endpoint(serve(reply)), tmp_path)[0]["systems"]["tuned"]
    assert (tuned["wins"], tuned["ties"], tuned["losses"], tuned["order_decided"]) == (0, 4, 4, 0)
    assert tuned["value"] == pytest.approx(0.375)


def test_equal_answers_of_two_systems_are_no_difference(serve, tmp_path):
    def longer(body):
        first, second = shown(body)
        return completion("[[A]]" if len(first) >= len(second) else "[[B]]")

    same = [Says("base", "the same"), Says("twin", "the same")]
    result, _rows = judged_by(endpoint(serve(longer)), tmp_path, systems=same)
    assert "No difference" in result["verdict"] and result["systems"]["twin"]["value"] == 0.5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (completion("I cannot decide such things."), "the judge gave no verdict"),
        (completion(""), "the judge gave no verdict"),
        (completion("[[D]] or [[a]]"), "the judge gave no verdict"),
        ((200, b"<html>"), "gave no answer"),
        ((500, b'{"error": "overloaded"}'), "overloaded"),
    ],
)
def test_nonsense_is_counted_and_shown_never_a_mark(serve, tmp_path, content, says):
    result, rows = judged_by(endpoint(serve(lambda body: content)), tmp_path)
    tuned = result["systems"]["tuned"]
    assert (tuned["answered"], tuned["unanswered"], tuned["value"]) == (0, 8, None)
    assert len(tuned["reasons"]) == 1 and says in tuned["reasons"][0]
    assert result["verdict"] == "No sample was answered by both." and says in rows[0]["unanswered"]["tuned"]
    assert result["systems"]["base"]["answered"] == 8


def test_a_judge_that_goes_away_leaves_what_it_said(serve, tmp_path):
    """It answers ten requests, then its server is gone; the rest is counted, and asked again the next time."""
    lock, said = threading.Lock(), []

    def reply(body):
        with lock:
            said.append(body)
            return completion("[[B]]") if len(said) <= 10 else (503, b"")

    server = serve(reply)
    tuned = judged_by(endpoint(server), tmp_path, count=40)[0]["systems"]["tuned"]
    assert 0 < tuned["answered"] < 40 and tuned["answered"] + tuned["unanswered"] == 40
    said.clear()
    again = serve(lambda body: completion("[[B]]"))
    tuned = judged_by(endpoint(again), tmp_path, count=40)[0]["systems"]["tuned"]
    assert tuned["answered"] == 40 and len(again.seen) == 80 - 10


def test_a_judge_that_hangs_is_given_up(serve, tmp_path):
    """Four requests without a byte, and it counts as gone."""
    done = threading.Event()

    def hang(body):
        done.wait(5)
        return completion("[[A]]")

    began = time.monotonic()
    tuned = judged_by(endpoint(serve(hang), timeout=0.2), tmp_path, count=60)[0]["systems"]["tuned"]
    done.set()
    assert tuned["unanswered"] == 60 and any("went away" in reason for reason in tuned["reasons"])
    assert time.monotonic() - began < 60


def test_who_is_missing_an_answer_is_not_compared(serve, tmp_path):
    systems = [Says("base", "short", "!too long"), Says("tuned", "a longer answer")]
    result, _rows = judged_by(endpoint(serve(lambda body: completion("[[C]]"))), tmp_path, systems=systems)
    assert result["systems"]["base"]["unanswered"] == 4
    tuned = result["systems"]["tuned"]
    assert (tuned["ties"], tuned["unanswered"]) == (4, 4) and "nothing to compare" in tuned["reasons"][0]


def test_within_a_limit_of_time_the_judge_sees_whole_rounds(serve, tmp_path):
    class Once(Clock):
        def __init__(self) -> None:
            super().__init__(1000.0)
            self.looks = 0

        def is_over(self) -> bool:
            self.looks += 1
            return self.looks > 1

    judge = endpoint(serve(lambda body: completion("[[C]]")))
    tuned = judged_by(judge, tmp_path, count=3 * ROUND, clock=Once())[0]["systems"]["tuned"]
    assert (tuned["ties"], tuned["unasked"], tuned["unanswered"]) == (ROUND, 2 * ROUND, 0)


def test_a_local_model_judges(tmp_path):
    """A tiny one, which has no idea: its nonsense is counted, nothing falls over."""
    folder = str(save_base(tmp_path / "base", max_position_embeddings=2048))
    answering = ModelAnswering(load_model(folder, CPU), Renderer(load_tokenizer(folder)), CPU, nullcontext)
    judge = System("tiny", "model", "tiny", lambda: nullcontext(answering))
    tuned = judged_by(judge, tmp_path, count=2)[0]["systems"]["tuned"]
    assert tuned["answered"] + tuned["unanswered"] == 2 and tuned["unasked"] == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[[A]]", "A"),
        ("First I thought [[A]], but it is [[ B ]].", "B"),
        ("Neither.\n[[C]]", "C"),
        ("Answer B", "B"),
        ("Respuesta: a.", "A"),
        ("The better one is clear.", None),
        ("[[Z]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_word(text, wanted):
    assert verdict(text) == wanted


def test_criteria_reach_the_judge(serve, tmp_path):
    server = serve(lambda body: completion("[[C]]"))
    task = TASK.model_copy(update={"criteria": "Which is kinder?"})
    asked = prepare(task, samples(1), 0)
    names = [Says("base", "a").system(), Says("tuned", "").system()]
    sitting = Sitting(names, [asked], Answers(tmp_path / "a.jsonl"), open_judge=lambda task: endpoint(server))
    sitting.ask()
    text = json.dumps(server.seen[0])
    assert "Which is kinder?" in text and sitting.results()[0][0]["systems"]["tuned"]["problems"] == {"empty": 1}
