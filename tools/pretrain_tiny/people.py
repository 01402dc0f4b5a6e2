"""First names and things to count, and the voices that tell: who speaks, in which person, of which gender."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from grammar import Voice, read_sections

WORDS = {name: " ".join(parts[""]).split() for name, parts in read_sections("nombres.txt").items()}
WOMEN, MEN, ENGLISH = WORDS["mujeres"], WORDS["hombres"], WORDS["english"]


def speaker(rng: random.Random, lexicon: Mapping[str, Sequence[str]], person: str | None = None) -> Voice:
    """A Spanish voice: `person` is "yo", "nosotros" or "tercera" (None: by chance); `nombre` is bound to a name."""
    person = person or rng.choices(("yo", "tercera", "nosotros"), (5, 4, 2))[0]
    feminine = rng.random() < 0.5
    voice = Voice(rng, lexicon, person=person, feminine=feminine)
    voice.bound["nombre"] = rng.choice(WOMEN if feminine else MEN)
    return voice
