"""A small template language for written text: choices, names, and Spanish agreement.

`[a|b]` chooses one branch (they nest), `{name}` is what is bound to the name, else a line of the lexicon, else a
Spanish verb in the third person made to agree with the speaker. Endings: `@` is o/a/os/as, `=` is ""/s, `%` is ""/es,
`^` is ""/a/es/as, and `#` after a verb puts it in the plural. It knows no vocabulary of its own: that is in text/*.txt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TEXT = Path(__file__).parent / "text"

# Third person singular to (first singular, first plural), where the rules in `conjugate` would be wrong.
IRREGULAR: dict[str, tuple[str, str]] = {
    "fue": ("fui", "fuimos"),
    "hizo": ("hice", "hicimos"),
    "puso": ("puse", "pusimos"),
    "tuvo": ("tuve", "tuvimos"),
    "estuvo": ("estuve", "estuvimos"),
    "pudo": ("pude", "pudimos"),
    "pidió": ("pedí", "pedimos"),
    "repitió": ("repetí", "repetimos"),
    "sintió": ("sentí", "sentimos"),
    "durmió": ("dormí", "dormimos"),
    "rio": ("reí", "reímos"),
    "vio": ("vi", "vimos"),
    "leyó": ("leí", "leímos"),
    "cambió": ("cambié", "cambiamos"),
    "envió": ("envié", "enviamos"),
    "estudió": ("estudié", "estudiamos"),
    "ha": ("he", "hemos"),
    "tiene": ("tengo", "tenemos"),
    "está": ("estoy", "estamos"),
    "sabe": ("sé", "sabemos"),
    "puede": ("puedo", "podemos"),
    "piensa": ("pienso", "pensamos"),
    "usa": ("uso", "usamos"),
    "recomienda": ("recomiendo", "recomendamos"),
    "siente": ("siento", "sentimos"),
    "era": ("era", "era"),
    "se": ("me", "nos"),
    "su": ("mi", "mi"),
    "me": ("me", "nos"),
}


def conjugate(verb: str, person: str) -> str:
    """The third person singular `verb` for `person`: "yo", "nosotros" or "tercera". Raises KeyError."""
    if person == "tercera":
        return "le" if verb == "me" else verb
    lower = verb[0].lower() + verb[1:]
    plural = person == "nosotros"
    if lower in IRREGULAR:
        form = IRREGULAR[lower][plural]
    elif lower.endswith("ió"):
        form = lower[:-2] + ("imos" if plural else "í")
    elif lower.endswith("ó"):
        stem = lower[:-1]
        hard = re.sub("z$", "c", re.sub("g$", "gu", re.sub("c$", "qu", stem)))
        form = stem + "amos" if plural else hard + "é"
    elif lower.endswith("rá"):
        form = lower[:-1] + ("emos" if plural else "é")
    elif lower.endswith("ía"):
        form = lower[:-2] + "íamos" if plural else lower
    elif lower.endswith("aba"):
        form = lower[:-3] + "ábamos" if plural else lower
    else:
        raise KeyError(verb)
    return form[0].upper() + form[1:] if verb[0].isupper() else form


THIRD_PLURAL = {
    "es": "son",
    "era": "eran",
    "fue": "fueron",
    "dio": "dieron",
    "está": "están",
    "tuvo": "tuvieron",
    "hizo": "hicieron",
    "estuvo": "estuvieron",
    "ha sido": "han sido",
    "ha salido": "han salido",
}


def pluralise(verb: str) -> str:
    """The third person plural of a singular `verb`, which may follow a pronoun ("se mostró")."""
    if verb in THIRD_PLURAL:
        return THIRD_PLURAL[verb]
    if verb.endswith("ió"):
        return verb[:-1] + "eron"
    return verb[:-1] + "aron" if verb.endswith("ó") else verb + "n"


def agree(text: str, feminine: bool, plural: bool) -> str:
    """`text` with its endings @, =, %, ^ and # resolved."""
    if not plural:
        text = text.replace("@", "a" if feminine else "o").replace("^", "a" if feminine else "")
        return re.sub("[=%#]", "", text)
    text = text.replace("z%", "ces").replace("ón%", "ones").replace("%", "es").replace("=", "s")
    text = text.replace("@", "as" if feminine else "os").replace("^", "as" if feminine else "es")
    return re.sub(r"(\w+)#", lambda found: pluralise(found.group(1)), text)


def noun_agreement(noun: str) -> tuple[bool, bool]:
    """(feminine, plural) of a noun phrase that begins with its article."""
    article = noun.split(maxsplit=1)[0]
    return article in {"la", "las", "una", "unas"}, article in {"los", "las", "unos", "unas"}


Piece = str | tuple[str, tuple[object, ...]]


@cache
def parse(template: str) -> tuple[Piece, ...]:
    """`template` as literals, ("name", (key,)) and ("choice", branches)."""
    pieces: list[Piece] = []
    start = at = 0
    while at < len(template):
        mark = template[at]
        if mark not in "[{":
            at += 1
            continue
        if at > start:
            pieces.append(template[start:at])
        if mark == "{":
            end = template.index("}", at)
            pieces.append(("name", (template[at + 1 : end],)))
        else:
            depth, end, cut, branches = 1, at, at + 1, []
            while depth:
                end += 1
                depth += {"[": 1, "]": -1}.get(template[end], 0)
                if depth == 0 or (depth == 1 and template[end] == "|"):
                    branches.append(parse(template[cut:end]))
                    cut = end + 1
            pieces.append(("choice", tuple(branches)))
        start = at = end + 1
    if start < len(template):
        pieces.append(template[start:])
    return tuple(pieces)


@dataclass
class Voice:
    """Who speaks, and what names mean for as long as one text lasts."""

    rng: random.Random
    lexicon: Mapping[str, Sequence[str]] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    person: str = "tercera"
    feminine: bool = False
    on_unknown: Callable[[str, str], str] = conjugate

    def say(self, template: str) -> str:
        """`template` filled in, its endings agreeing with the speaker."""
        return agree(self._fill(parse(template)), self.feminine, self.person == "nosotros")

    def pick(self, options: Sequence[str]) -> str:
        """One of `options`, filled in."""
        return self.say(options[int(self.rng.random() * len(options))])

    def _fill(self, pieces: tuple[Piece, ...]) -> str:
        out: list[str] = []
        for piece in pieces:
            if isinstance(piece, str):
                out.append(piece)
            elif piece[0] == "choice":
                branches = piece[1]
                out.append(self._fill(branches[int(self.rng.random() * len(branches))]))  # type: ignore[arg-type]
            else:
                out.append(self._name(str(piece[1][0])))
        return "".join(out)

    def _name(self, name: str) -> str:
        if name in self.bound:
            return self.bound[name]
        options = self.lexicon.get(name)
        if options:
            return self._fill(parse(options[int(self.rng.random() * len(options))]))
        return self.on_unknown(name, self.person)


def sentence(text: str) -> str:
    """`text` with a capital and a full stop, spaces and stray punctuation tidied."""
    text = re.sub(r"\s+", " ", text).strip().rstrip(",;:")
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    text = re.sub(r"\b(de|a) el\b", lambda found: found.group(1) + "l", text)
    text = re.sub(r"([.!?:]) +([a-záéíóúñ])", lambda found: _capital(found), text)
    if text and text[-1] not in '.!?»…"':
        text += "."
    first = next((i for i, letter in enumerate(text) if letter.isalpha()), 0)
    return text[:first] + text[first : first + 1].upper() + text[first + 1 :]


def _capital(found: re.Match[str]) -> str:
    keep = found.group(1) == ":"
    return f"{found.group(1)} {found.group(2) if keep else found.group(2).upper()}"


def read_sections(name: str) -> dict[str, dict[str, list[str]]]:
    """text/`name`: "== header" opens a section, "-- part" a part of it (else the part is ""); # comments at the top."""
    sections: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    part: list[str] = []
    for line in (TEXT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            section = sections.setdefault(line[3:].strip(), {})
            part = section.setdefault("", [])
        elif line.startswith("-- "):
            part = section.setdefault(line[3:].strip(), [])
        elif line.strip() and sections:
            part.append(line)
    return sections
