"""Rating in the terminal: a question, its answers, one key."""

import time

from afina.console import Console
from afina.evaluate.ratings.questions import Question, Round, role_named
from afina.language import _


def rate(questions: Round, console: Console) -> int:
    """Ask until all is rated or the rater stops (q, Ctrl-D); returns how many were rated. Each is kept at once."""
    done = 0
    while (question := questions.next()) is not None:
        _show(question, console)
        began = time.monotonic()
        value = _value(question, console)
        if value is None:
            break
        questions.keep(question, value, time.monotonic() - began)
        done += 1
    return done


def _show(question: Question, console: Console) -> None:
    console.line()
    console.heading(f"{question.number}/{question.total}  {question.item.task}")
    for role, content in question.item.before:
        console.line(f"{role_named(role)}: {content}")
    console.line(question.item.prompt)
    for letter, answer in zip("AB", question.answers, strict=False):
        console.line()
        console.heading(_("Answer {letter}").format(letter=letter) if len(question.answers) > 1 else _("Answer"))
        console.line(answer if answer.strip() else _("(nothing)"))
    console.line()


def _value(question: Question, console: Console) -> int | None:
    asked = (
        _("Better: a, b, or = for equally good (q stops) > ")
        if question.item.mode == "pair"
        else _("From 1 (useless) to 5 (excellent) (q stops) > ")
    )
    while True:
        try:
            said = console.ask(asked).strip()
        except EOFError:
            return None
        if said.lower() in ("q", "quit", "exit"):
            return None
        value = question.value_of(said)
        if value is not None:
            return value
