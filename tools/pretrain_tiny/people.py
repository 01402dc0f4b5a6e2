"""First names, and the voices that tell things: who speaks, in which person, of which gender."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from grammar import Voice

WOMEN = (
    "Marta Lucía Ana Carmen Elena Sofía Paula Laura Isabel Rosa Julia Clara Irene Nuria Pilar Valentina Camila Daniela "
    "Gabriela Teresa Beatriz Alba Noelia Silvia Ximena Fernanda Lupe Inés Olga Verónica Raquel Sara"
).split()
MEN = (
    "Luis Pedro Juan Carlos Miguel Jorge Pablo Diego Andrés Javier Manuel Tomás Raúl Mateo Hugo Sergio Álvaro Iván Óscar "
    "Ramón Emilio Gonzalo Rubén Nicolás Santiago Joaquín Fernando Alberto Víctor Martín Samuel Lucas"
).split()
ENGLISH = (
    "Tom Anna Ben Lucy Jack Emma Sam Kate Mia Leo Grace Max Ella Noah Rose Adam Lily Paul Amy Jane Mark Alice Peter Nina"
).split()


def speaker(rng: random.Random, lexicon: Mapping[str, Sequence[str]], person: str | None = None) -> Voice:
    """A Spanish voice: `person` is "yo", "nosotros" or "tercera" (by chance where None); `nombre` is bound to a name."""
    person = person or rng.choices(("yo", "tercera", "nosotros"), (5, 4, 2))[0]
    feminine = rng.random() < 0.5
    voice = Voice(rng, lexicon, person=person, feminine=feminine)
    voice.bound["nombre"] = rng.choice(WOMEN if feminine else MEN)
    return voice
