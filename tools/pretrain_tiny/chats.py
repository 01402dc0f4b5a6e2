"""Chats that are not about opinions: small talk, definitions, how-tos; from text/charlas.txt and text/saberes.txt."""

from __future__ import annotations

import random

import lessons
import stories
from grammar import TEXT, Voice, read_sections
from opinions import turns
from people import ENGLISH, MEN, WOMEN

SABERES = {name: parts[""] for name, parts in read_sections("saberes.txt").items()}


def _read_chats() -> list[list[str]]:
    blocks = (TEXT / "charlas.txt").read_text(encoding="utf-8").split("\n\n")[1:]
    return [[line[3:] for line in block.splitlines() if line.startswith(("U: ", "A: "))] for block in blocks]


CHATS = _read_chats()


def small_talk(rng: random.Random) -> str:
    """A written chat with its choices made; now and then two one after the other."""
    lines = list(rng.choice(CHATS))
    if rng.random() < 0.25:
        lines += rng.choice(CHATS)
    voice = Voice(rng, {}, {"n": rng.choice(WOMEN + MEN + ENGLISH)})
    messages = [voice.say(line) for line in lines]
    if rng.random() < 0.2:
        messages[0] = messages[0].lower().strip("¡!¿")
    return turns(*messages)


def definition(rng: random.Random) -> str:
    """A word explained, as a chat or as a line of a glossary."""
    spanish = rng.random() < 0.7
    pick = [
        line.split(" = ") for line in rng.sample(SABERES["es_define" if spanish else "en_define"], rng.randint(1, 4))
    ]
    word, sense = pick[0]
    if rng.random() < 0.4:
        return "\n".join(f"{word.capitalize()}: {sense}." for word, sense in pick)
    if spanish:
        question = rng.choice(
            ("¿Qué significa «{}»?", "¿Qué quiere decir {}?", "Define {}.", "Explícame la palabra {}.", "¿Qué es {}?")
        )
        answer = rng.choice(
            ("«{}» es {}.", "Se llama {} a {}.") if not sense.startswith("que ") else ("«{}» significa {}.",)
        )
    else:
        question = rng.choice(('What does "{}" mean?', "Define {}.", "Explain the word {}."))
        answer = '"{}" means {}.'
    return turns(question.format(word), answer.format(word, sense))


def how_to(rng: random.Random) -> str:
    """Numbered steps."""
    spanish = rng.random() < 0.7
    goal, *steps = rng.choice(SABERES["es_pasos" if spanish else "en_pasos"]).removeprefix("# ").split(" | ")
    goal = goal.removeprefix("how to ").strip()
    listed = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    if spanish:
        question = rng.choice(
            ("¿Cómo puedo {}?", "Dime cómo {}.", "Explícame paso a paso cómo {}.", "Quiero {}. ¿Qué hago?")
        )
    else:
        question = rng.choice(("How do I {}?", "Tell me how to {}.", "I want to {}. What should I do?"))
    return turns(question.format(goal), listed)


def told_story(rng: random.Random) -> str:
    """A story on request."""
    if rng.random() < 0.65:
        ask = rng.choice(
            ("Cuéntame un cuento.", "Cuéntame una historia corta.", "Escribe un relato breve.", "Inventa un cuento.")
        )
        return turns(ask, stories.spanish(rng))
    ask = rng.choice(("Tell me a story.", "Write a short story.", "Make up a short tale."))
    return turns(ask, stories.english(rng))


def lesson(rng: random.Random) -> str:
    """A sum, a word problem, a snippet of Python or a JSON object on request."""
    question, answer = rng.choice((lessons.sums, lessons.problem, lessons.problem, lessons.snippet, lessons.record))(
        rng
    )
    return turns(question, answer)
