"""People's ratings: blind, kept, counted rightly, agreed upon as published, handed on; a page in a real browser."""

import csv
import http.client
import io
import json
import sqlite3
from pathlib import Path

import pytest
from browser import Browser
from hypothesis import given
from hypothesis import strategies as st

from afina.console import Console
from afina.errors import DataError, OutputError, RecipeError
from afina.evaluate.ratings.agreement import alpha
from afina.evaluate.ratings.figures import as_csv, preferences, summary
from afina.evaluate.ratings.page import Page
from afina.evaluate.ratings.questions import Round, items
from afina.evaluate.ratings.run import _chosen, export_ratings, rate_run
from afina.evaluate.ratings.store import SCHEMA, Item, Store

ROWS = [
    {"task": "t", "prompt": f"question {number}", "expected": "-", "base": f"base {number}", "tuned": f"tuned {number}"}
    for number in range(12)
]


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), examples A and C; None is a gap.
TWO = ["0100000010", "1110010000"]
FOUR = ["1 2 3 3 2 1 4 1 2 * * *", "1 2 3 3 2 2 4 1 2 5 * 3", "* 3 3 3 2 3 4 2 2 5 1 *", "1 2 3 3 2 4 4 1 2 5 1 *"]


@pytest.mark.parametrize("scale, published", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_as_published(scale, published):
    units = [[int(value) for value in unit if value != "*"] for unit in zip(*map(str.split, FOUR), strict=True)]
    assert alpha(units, scale) == pytest.approx(published, abs=5e-4)


def test_alpha_of_two_raters_is_as_published():
    units = [[int(value) for value in unit] for unit in zip(*TWO, strict=True)]
    assert alpha(units, "nominal") == pytest.approx(0.095, abs=5e-4)


@given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=4), min_size=2, max_size=12))
def test_alpha_is_one_exactly_where_all_agree(units):
    agreed = [[unit[0]] * len(unit) for unit in units]
    values = {unit[0] for unit in units}
    for scale in ("nominal", "ordinal", "interval"):
        whole = alpha(agreed, scale)
        assert whole is None if len(values) == 1 else whole == pytest.approx(1.0)
        found = alpha(units, scale)
        assert found is None or found <= 1.0 + 1e-12
        assert found == pytest.approx(alpha(units[::-1], scale)) if found is not None else True
    assert alpha([[1], [2]], "nominal") is None


def test_nothing_shown_tells_who_wrote_it_and_sides_change(tmp_path):
    wanted = items(ROWS, ["base", "tuned"], "pair")
    assert len(wanted) == 12
    sides, orders = set(), []
    for rater in ("ana", "luis"):
        questions, order = Round(Store(tmp_path / f"{rater}.sqlite"), rater, wanted), []
        while (question := questions.next()) is not None:
            sides.add(question.turned)
            order.append(question.item.prompt)
            assert question.answers == Round(Store(tmp_path / f"{rater}.sqlite"), rater, wanted).next().answers
            better = "ab"[[text.startswith("tuned") for text in question.answers].index(True)]
            questions.keep(question, question.value_of(better), 1.0)
        orders.append(order)
        figures = summary(Store(tmp_path / f"{rater}.sqlite").all())["pairs"][0]
        assert (figures["right_preferred"], figures["left_preferred"]) == (12, 0)  # whatever side it was on
        assert figures["p_value"] < 0.001
    assert sides == {True, False} and orders[0] != orders[1] != sorted(orders[1])


def test_a_rater_goes_on_where_they_were_and_may_change_their_mind(tmp_path):
    wanted, store = items(ROWS, ["base", "tuned"], "score"), Store(tmp_path / "r.sqlite")
    assert len(wanted) == 24
    questions = Round(store, "ana", wanted)
    first = questions.next()
    questions.keep(first, 2, 3.5)
    again = Round(Store(tmp_path / "r.sqlite"), "ana", wanted)
    assert again.next().item != first.item and again.next().number == 2
    again.keep(first, 5, 1.0)
    (rating,) = store.all()
    assert (rating.value, rating.rater, rating.item) == (5, "ana", first.item) and rating.at.endswith("+00:00")


def test_equal_answers_are_not_asked_about():
    rows = [*ROWS, {**ROWS[0], "prompt": "same", "base": "x", "tuned": "x"}, {"task": "t", "prompt": "p", "base": "x"}]
    assert len(items(rows, ["base", "tuned"], "pair")) == 12


@pytest.mark.parametrize("choice", ["0", "6", "", "x", "1.5", "９", "-1"])
def test_what_is_no_rating_is_none(tmp_path, choice):
    for mode in ("score", "pair"):
        question = Round(Store(tmp_path / "r.sqlite"), "ana", items(ROWS, ["base", "tuned"], mode)).next()
        assert question.value_of(choice) is None


def rated(store: Store) -> None:
    pair = Item("pair", "t", "=1+1", "base", "bad", "tuned", "good")
    for rater, value in (("ana", -1), ("luis", -1), ("eva", 1)):
        store.add(rater, pair, value, shown_first="base", seconds=1.0)
    store.add("ana", Item("pair", "t", "tie", "base", "x", "tuned", "y"), 0, shown_first="tuned", seconds=2.0)
    for answer, values in (("fine", (4, 5)), ("poor", (1, 2))):
        system = "tuned" if answer == "fine" else "base"
        for rater, value in zip(("ana", "luis"), values, strict=True):
            item = Item("score", "t", "q, with a comma\nand a line", system, answer)
            store.add(rater, item, value, shown_first=system, seconds=1.0)


def test_averages_preferences_and_files(tmp_path):
    store = Store(tmp_path / "ratings.sqlite")
    rated(store)
    figures = summary(store.all())
    assert figures["scores"]["tuned"]["mean"] == 4.5 and figures["scores"]["tuned"]["counts"]["5"] == 1
    low, high = figures["scores"]["tuned"]["interval"]  # of one answer
    assert 1 < low < 4.5 < high <= 5
    assert figures["pairs"][0] | {"interval": 0, "p_value": 0} == {
        **{"left": "base", "right": "tuned", "left_preferred": 0, "right_preferred": 1, "ties": 1},
        **{"share_right": 1.0, "interval": 0, "p_value": 0, "ratings": 4, "items": 2},
    }
    table = list(csv.DictReader(io.StringIO(as_csv(store.all()))))
    assert len(table) == 8 and table[0]["prompt"] == "'=1+1" and table[-1]["prompt"] == "q, with a comma\nand a line"
    learnt = [json.loads(line) for line in preferences(store.all()).splitlines()]
    told = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in learnt]
    assert told == [("good", "bad"), ("fine", "poor")]
    assert export_ratings(tmp_path, tmp_path / "out.csv") == 8
    assert export_ratings(tmp_path, tmp_path / "out.jsonl") == 2


def test_a_conversation_is_shown_and_handed_on_whole(tmp_path, capsys):
    before = [{"role": "system", "content": "Sé breve."}, {"role": "user", "content": "Hola"}]
    before.append({"role": "assistant", "content": "¡Hola!"})
    rows = [{**ROWS[0], "before": before}, ROWS[1]]
    store = Store(tmp_path / "r.sqlite")
    for item in items(rows, ["base", "tuned"], "pair"):
        store.add("ana", item, -1, shown_first="base", seconds=1.0)
    learnt = [json.loads(line) for line in preferences(store.all()).splitlines()]
    assert learnt[0]["prompt"] == [*before, {"role": "user", "content": ROWS[0]["prompt"]}]
    assert learnt[1]["prompt"] == [{"role": "user", "content": ROWS[1]["prompt"]}]
    assert store.all()[0].item.key == items(rows, ["base", "tuned"], "pair")[0].key


def test_a_file_of_before_is_read_and_gone_on_with(tmp_path):
    """Made when only the last question was kept."""
    with sqlite3.connect(tmp_path / "r.sqlite") as connection:
        connection.execute(SCHEMA.replace("    before TEXT NOT NULL DEFAULT '[]',\n", ""))
    (wanted, *_rest) = items(ROWS, ["base", "tuned"], "score")
    Store(tmp_path / "r.sqlite").add("ana", wanted, 4, shown_first="base", seconds=1.0)
    assert Store(tmp_path / "r.sqlite").all()[0].item == wanted


def test_written_answers_are_rated_or_those_of_a_task(tmp_path):
    rows = [{"task": "written", "tokens": {"base": 3}}, {"task": "labels"}]
    assert _chosen(rows, []) == rows[:1] and _chosen(rows[1:], []) == rows[1:]
    assert _chosen(rows, ["labels"]) == rows[1:]
    with pytest.raises(RecipeError, match="no answers of a task nothing"):
        _chosen(rows, ["nothing"])


def test_a_damaged_file_is_told_and_kept(tmp_path):
    (tmp_path / "r.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(OutputError, match=r"r\.sqlite"):
        Store(tmp_path / "r.sqlite")
    assert (tmp_path / "r.sqlite").read_bytes().startswith(b"not a")


class Typed(Console):
    """A console at which someone types what was written down."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self._lines = iter(lines)

    def ask(self, prompt: str) -> str:
        """The next line; the end of input after the last."""
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "evaluation").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "evaluation" / "predictions.jsonl").write_text(text)
    return tmp_path


def test_rating_in_the_terminal(run, capsys):
    rate_run(run, Typed("4", "seven", "5", "q"), mode="score", systems=[], rater="ana", page=False)
    assert [rating.value for rating in Store(run / "ratings.sqlite").all()] == [4, 5]
    rate_run(run, Typed("a", "="), mode="pair", systems=[], rater="ana", page=False)
    figures = json.loads((run / "ratings.json").read_text())
    assert figures["ratings"] == 4 and figures["pairs"][0]["ties"] == 1
    shown = capsys.readouterr().out
    assert "question" in shown and "mean of 1 to 5" in shown
    with pytest.raises(RecipeError, match="two systems"):
        rate_run(run, Typed(), mode="pair", systems=["base"], rater="a", page=False)
    with pytest.raises(DataError, match="nothing to rate"):
        rate_run(run, Typed(), mode="pair", systems=["base", "nobody"], rater="a", page=False)
    with pytest.raises(DataError, match="no answers"):
        rate_run(run / "evaluation", Typed(), mode="score", systems=[], rater="a", page=False)


@pytest.fixture
def page(tmp_path):
    found = Page(Round(Store(tmp_path / "r.sqlite"), "ana", items(ROWS[:3], ["base", "tuned"], "pair")))
    yield found
    found.close()


def ask(page: Page, method: str, path: str | None = None, body: str = "", **headers: str) -> tuple[int, str]:
    host, _slash, rest = page.url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request(method, f"/{rest}" if path is None else path, body or None, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_admits_itself_alone(page):
    assert ask(page, "GET")[0] == 200
    assert ask(page, "GET", "/")[0] == ask(page, "GET", "/wrong-key/")[0] == 404
    assert ask(page, "GET", Host="localhost.evil")[0] == 404
    assert ask(page, "POST", body="choice=a", Origin="http://elsewhere")[0] == 404
    for body in ("choice=a", "item=x&choice=a", "choice=5&item=", "\xff" * 100, "a" * 5000):
        assert ask(page, "POST", body=body)[0] in (400, 413)
    key = page._round.next().item.key
    assert ask(page, "POST", body=f"item={key}&choice=9")[0] == 400
    assert page._round.store.all() == []


@pytest.mark.slow
def test_a_browser_rates_on_the_page(page):
    browser = Browser()
    try:
        browser.open(page.url)
        for number in range(3):
            shown = browser.evaluate("[...document.querySelectorAll('.answers .text')].map(node => node.innerText)")
            assert len(shown) == 2 and f"{number + 1} / 3" in browser.evaluate("document.body.innerText")
            assert not any(word in browser.evaluate("document.title") for word in ("base", "tuned"))
            button = "ab"[[text.startswith("tuned") for text in shown].index(True)]
            browser.evaluate(f"document.querySelector('button[value={button}]').click()")
            seen = f"{number + 2} / 3" if number < 2 else "Thank you"
            browser.wait(f"document.body && document.body.innerText.includes('{seen}')")
    finally:
        browser.close()
    found = page._round.store.all()
    assert len(found) == 3 and all(rating.value == -1 and rating.item.other_system == "tuned" for rating in found)
    assert all(0 < rating.seconds < 600 for rating in found)
