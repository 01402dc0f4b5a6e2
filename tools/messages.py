"""Gather every sentence a user may read into the Spanish catalogue, and compile it.

    make messages                       or python tools/messages.py
    python tools/messages.py --check    changes nothing; exits 1 when the catalogue is not what the source says

Sentences are found where they are written: `_("...")` in Python and in Jinja templates, and the docstrings of the
recipe's schema, which are its help. After `make messages`, translate what it lists in src/afina/locale/es/LC_MESSAGES/
afina.po (an empty `msgstr ""`, or one marked `fuzzy`), keep every `{placeholder}`, and run it again: the compiled
afina.mo beside it is committed too.
"""

import ast
import io
import string
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from afina.recipe.schema import help_texts

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "afina"
PO = SOURCE / "locale" / "es" / "LC_MESSAGES" / "afina.po"
MO = PO.with_suffix(".mo")
DATE = datetime(2026, 11, 20, tzinfo=UTC)
HEADER = """\
# Afina in Spanish.
#
# Made by tools/messages.py (`make messages`): it adds and removes messages, people translate them.
# Labels are nouns or infinitives; the user is addressed as "tú". Placeholders in braces stay as they are.
#"""


def from_python(
    file: IO[bytes], keywords: object, tags: object, options: object
) -> Iterator[tuple[int, str, str, list[str]]]:
    """The messages of one module, by its syntax tree: Babel's own reader does not look inside f-strings."""
    for node in ast.walk(ast.parse(file.read())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_" and node.args:
            message = node.args[0]
            if isinstance(message, ast.Constant) and isinstance(message.value, str):
                yield node.lineno, "_", message.value, []


def gather() -> Catalog:
    """Every message of the source, with no translation and no place: places change too often to be kept."""
    found = Catalog()
    for _file, _line, message, _comments, _context in extract_from_dir(
        SOURCE, METHODS, keywords={"_": None}, comment_tags=()
    ):
        found.add(message)
    for text in help_texts():
        found.add(text)
    return found


METHODS = [("**.py", from_python), ("**.jinja", "jinja2.ext:babel_extract")]


def merge(known: Catalog, found: Catalog) -> Catalog:
    """What the source says, with the translations there are; a message that changed a little is marked fuzzy."""
    merged = Catalog(locale="es", header_comment=HEADER, project="afina", version="0", fuzzy=False)
    spare = {message.id: message for message in known if message.id and message.id not in found}
    for message in sorted((message for message in found if message.id), key=lambda message: str(message.id)):
        old = known.get(message.id)
        if old is not None and old.string:
            merged.add(message.id, old.string, flags=old.flags)
        elif near := nearest(str(message.id), spare):
            merged.add(message.id, near.string, flags={"fuzzy"}, previous_id=str(near.id))
        else:
            merged.add(message.id)
    return merged


def nearest(text: str, known: dict[str, Message]) -> Message | None:
    """The message this one was before somebody mended its English."""
    from difflib import get_close_matches

    close = get_close_matches(text, [str(key) for key in known], n=1, cutoff=0.85)
    return known[close[0]] if close else None


def placeholders(text: str) -> list[tuple[str, str, str]]:
    """Name, format and conversion of each `{...}`, sorted. Raises ValueError for a text that str.format refuses."""
    parts = string.Formatter().parse(text)
    return sorted((name, spec or "", conversion or "") for _text, name, spec, conversion in parts if name is not None)


def unfinished(catalog: Catalog) -> list[str]:
    """The messages that have no translation, or one that somebody has yet to confirm."""
    return [str(message.id) for message in catalog if message.id and (not message.string or message.fuzzy)]


def as_po(catalog: Catalog) -> bytes:
    """The catalogue for people: one fixed date, so that nothing changes when nothing changed."""
    catalog.creation_date = catalog.revision_date = DATE
    for message in catalog:
        message.flags.discard("python-format")  # Babel takes "95% intervals" for one
    content = io.BytesIO()
    write_po(content, catalog, width=110)
    return content.getvalue()


def as_mo(catalog: Catalog) -> bytes:
    """The catalogue for gettext; what is fuzzy stays English."""
    catalog.creation_date = catalog.revision_date = DATE
    content = io.BytesIO()
    write_mo(content, catalog)
    return content.getvalue()


def read() -> Catalog:
    """The catalogue as it lies in the source tree."""
    with PO.open("rb") as file:
        return read_po(file, locale="es")


def main() -> int:
    """Refresh the two files, or with --check say whether they would change."""
    merged = merge(read() if PO.exists() else Catalog(locale="es"), gather())
    files = {PO: as_po(merged), MO: as_mo(read_po(io.BytesIO(as_po(merged)), locale="es"))}
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    missing = unfinished(merged)
    if "--check" not in sys.argv:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
    for path in stale:
        print(("stale: " if "--check" in sys.argv else "wrote ") + str(path.relative_to(ROOT)))
    for message in missing:
        print(f"to translate: {message!r}")
    print(f"{len(merged)} messages, {len(missing)} to translate")
    return 1 if missing or ("--check" in sys.argv and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
