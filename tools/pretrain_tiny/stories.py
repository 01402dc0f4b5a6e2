"""Short everyday stories in Spanish and English, from the grammars in text/relatos.txt."""

from __future__ import annotations

import random

from grammar import Voice, read_sections, sentence
from people import ENGLISH, MEN, WOMEN

RELATOS = {
    name: [line for text in parts[""] for line in (text.split("|") if "{" not in text else [text])]
    for name, parts in read_sections("relatos.txt").items()
}


def _tell(voice: Voice, language: str, middles: str, turn: str) -> str:
    parts = [
        f"{language}_{name}"
        for name in (("comienzo", middles, turn, "final") if language == "es" else ("start", middles, turn, "end"))
    ]
    lines = [voice.pick(RELATOS[parts[0]])]
    for _ in range(voice.rng.randint(1, 3)):
        lines += [voice.pick(RELATOS[parts[1]]), voice.pick(RELATOS[parts[2]])]
    lines.append(voice.pick(RELATOS[parts[3]]))
    return " ".join(sentence(line) for line in dict.fromkeys(lines))


def spanish(rng: random.Random) -> str:
    feminine = rng.random() < 0.5
    ending = "a" if feminine else "o"
    lexicon = RELATOS | {name: RELATOS[f"{name}_{ending}"] for name in ("oficio", "cualidad", "animo")}
    bound = {"un": "una" if feminine else "un", "pequen": "pequeñ@", "cansad": "cansad@"}
    hero = rng.choice(WOMEN if feminine else MEN)
    bound |= {"n": hero, "m": rng.choice([name for name in WOMEN + MEN if name != hero])}
    return _tell(Voice(rng, lexicon, bound, feminine=feminine), "es", "nudo", "giro")


def english(rng: random.Random) -> str:
    first, second = rng.sample(ENGLISH, 2)
    return _tell(Voice(rng, RELATOS, {"n": first, "m": second}), "en", "middle", "turn")
