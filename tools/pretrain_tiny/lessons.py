"""Sums worked in steps, word problems, small Python functions explained, and JSON objects, in Spanish and English.

Every function returns (question, answer); answers are computed, so they are right.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from people import ENGLISH, MEN, WOMEN, WORDS

THINGS = {"es": WORDS["cosas"], "en": WORDS["things"]}


def sums(rng: random.Random) -> tuple[str, str]:
    """One operation, sometimes split into tens and units."""
    sign = rng.choice("++--x")
    a, b = (rng.randint(2, 12), rng.randint(2, 12)) if sign == "x" else (rng.randint(1, 99), rng.randint(1, 99))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    value = {"+": a + b, "-": a - b, "x": a * b}[sign]
    question = rng.choice(("¿Cuánto es {}?", "Calcula {}.", "{} =", "What is {}?", "Work out {}.")).format(
        f"{a} {sign} {b}"
    )
    steps = ""
    if sign != "x" and a > 9 and b > 9 and b % 10 and rng.random() < 0.6:
        tens = b // 10 * 10
        middle = a + tens if sign == "+" else a - tens
        steps = f"{a} {sign} {tens} = {middle}. {middle} {sign} {b - tens} = {value}. "
    return question, f"{steps}{a} {sign} {b} = {value}"


def problem(rng: random.Random) -> tuple[str, str]:
    """A word problem of one or two steps, its answer worked out line by line."""
    language = rng.choice(("es", "es", "en"))
    thing, name = rng.choice(THINGS[language]), rng.choice(WOMEN + MEN if language == "es" else ENGLISH)
    a, b, c = rng.randint(3, 60), rng.randint(2, 30), rng.randint(2, 9)
    small, packs = rng.randint(2, 12), rng.randint(2, 10)
    both, product = a + b, packs * small
    give = rng.randint(1, both - 1)
    left = both - give
    spanish = (
        (
            f"{name} tiene {a} {thing}, compra {b} más y regala {give}. ¿Cuántas unidades le quedan?",
            f"Primero suma: {a} + {b} = {both}. Luego resta: {both} - {give} = {left}. Le quedan {left}.",
        ),
        (
            f"{name} compra {packs} cajas con {small} {thing} cada una. ¿Cuánto suman en total?",
            f"Multiplica: {packs} x {small} = {product}. En total son {product}.",
        ),
        (
            f"Una entrada cuesta {small} euros. ¿Cuánto pagan {packs} personas? ¿Y si gastan además {b} en comida?",
            f"Entradas: {packs} x {small} = {product}. Con la comida: {product} + {b} = {product + b} euros.",
        ),
        (
            f"{name} reparte {small * c} {thing} entre {c} amigos por igual. ¿Cuánto recibe cada uno?",
            f"Divide: {small * c} / {c} = {small}. Cada uno recibe {small}.",
        ),
    )
    english = (
        (
            f"{name} has {a} {thing}, buys {b} more and gives away {give}. How many are left?",
            f"First add: {a} + {b} = {both}. Then subtract: {both} - {give} = {left}. There are {left} left.",
        ),
        (
            f"{name} buys {packs} boxes with {small} {thing} each. How many {thing} in all?",
            f"Multiply: {packs} x {small} = {product}. There are {product} {thing}.",
        ),
        (
            f"{name} shares {small * c} {thing} equally among {c} friends. How many does each get?",
            f"Divide: {small * c} / {c} = {small}. Each gets {small}.",
        ),
    )
    return rng.choice(spanish if language == "es" else english)


# name in Spanish, in English, what it does in each, arguments, body
FUNCTIONS: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("suma", "add", "suma dos números", "adds two numbers", "a, b", "return a + b"),
    ("resta", "subtract", "resta dos números", "subtracts two numbers", "a, b", "return a - b"),
    ("doble", "double", "devuelve el doble de un número", "doubles a number", "n", "return 2 * n"),
    ("cuadrado", "square", "eleva un número al cuadrado", "squares a number", "n", "return n * n"),
    ("es_par", "is_even", "dice si un número es par", "tells whether a number is even", "n", "return n % 2 == 0"),
    (
        "mayor",
        "largest",
        "busca el mayor de una lista",
        "finds the largest item of a list",
        "items",
        "return max(items)",
    ),
    (
        "menor",
        "smallest",
        "busca el menor de una lista",
        "finds the smallest item of a list",
        "items",
        "return min(items)",
    ),
    (
        "media",
        "mean",
        "calcula la media de una lista",
        "computes the mean of a list",
        "items",
        "return sum(items) / len(items)",
    ),
    ("invierte", "reverse", "da la vuelta a un texto", "reverses a text", "text", "return text[::-1]"),
    ("mayusculas", "shout", "pasa un texto a mayúsculas", "turns a text into capitals", "text", "return text.upper()"),
    (
        "cuenta",
        "count_words",
        "cuenta las palabras de un texto",
        "counts the words of a text",
        "text",
        "return len(text.split())",
    ),
    ("ordena", "in_order", "ordena una lista", "sorts a list", "items", "return sorted(items)"),
    (
        "sin_repetir",
        "unique",
        "quita los repetidos",
        "removes duplicates",
        "items",
        "return list(dict.fromkeys(items))",
    ),
    (
        "pares",
        "evens",
        "se queda con los pares",
        "keeps the even numbers",
        "items",
        "return [n for n in items if n % 2 == 0]",
    ),
    (
        "total",
        "total",
        "suma una lista",
        "sums a list",
        "items",
        "total = 0\n    for item in items:\n        total += item\n    return total",
    ),
    (
        "factorial",
        "factorial",
        "calcula el factorial",
        "computes the factorial",
        "n",
        "if n <= 1:\n        return 1\n    return n * factorial(n - 1)",
    ),
    (
        "vocales",
        "vowels",
        "cuenta las vocales",
        "counts the vowels",
        "text",
        "return sum(1 for letter in text if letter in 'aeiou')",
    ),
)
ARGUMENTS = {
    "items": ("items", "numeros", "lista", "numbers", "values"),
    "text": ("text", "texto", "frase", "s"),
    "n": ("n", "x", "num"),
}


def snippet(rng: random.Random) -> tuple[str, str]:
    """A function of a few lines and a sentence that says what it does."""
    name, english_name, does, english_does, argument, body = rng.choice(FUNCTIONS)
    renamed = rng.choice(ARGUMENTS.get(argument, (argument,)))
    if argument in ("items", "text"):
        body, argument = body.replace(argument, renamed), renamed
    if rng.random() < 0.6:
        question = rng.choice(("Escribe una función de Python que {}.", "¿Cómo se hace en Python una función que {}?"))
        return question.format(does), f"def {name}({argument}):\n    {body}\n\nLa función `{name}` {does}."
    question = rng.choice(("Write a Python function that {}.", "Show me a Python function that {}."))
    code = f"def {english_name}({argument}):\n    {body.replace(name, english_name) if name == 'factorial' else body}"
    return question.format(english_does), f"{code}\n\nThe function `{english_name}` {english_does}."


def _person(rng: random.Random) -> dict[str, object]:
    city = rng.choice(("Madrid", "Lima", "Bogotá", "Quito", "Sevilla", "Rosario", "Puebla", "Valparaíso"))
    return {"nombre": rng.choice(WOMEN + MEN), "edad": rng.randint(7, 90), "ciudad": city}


def _order(rng: random.Random) -> dict[str, object]:
    return {
        "producto": rng.choice(THINGS["es"]),
        "cantidad": rng.randint(1, 40),
        "precio": rng.randint(1, 99),
        "urgente": rng.random() < 0.5,
    }


def _event(rng: random.Random) -> dict[str, object]:
    day = rng.choice(("lunes", "martes", "miércoles", "jueves", "viernes"))
    return {
        "evento": rng.choice(("reunión", "clase", "cena", "examen", "viaje")),
        "día": day,
        "hora": f"{rng.randint(8, 22)}:{rng.choice(('00', '30'))}",
    }


def _book(rng: random.Random) -> dict[str, object]:
    return {
        "title": rng.choice(("The River", "The Key", "Winter", "The Clock", "Home")),
        "author": rng.choice(ENGLISH),
        "pages": rng.randint(40, 600),
    }


RECORDS: tuple[Callable[[random.Random], dict[str, object]], ...] = (_person, _order, _event, _book)


def record(rng: random.Random) -> tuple[str, str]:
    """A flat JSON object made from the values in the question."""
    values = rng.choice(RECORDS)(rng)
    listed = ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()
    )
    question = rng.choice(
        ("Escribe en JSON: {}.", "Devuelve un JSON con {}.", "Pasa esto a JSON: {}.", "Write this as JSON: {}.")
    )
    return question.format(listed), json.dumps(values, ensure_ascii=False)


def worksheet(rng: random.Random) -> str:
    """Several of them as plain text, the way a notebook would have them."""
    make = rng.choice((sums, sums, problem, snippet, record))
    return "\n".join("\n".join(make(rng)) for _ in range(rng.randint(1, 4)))
