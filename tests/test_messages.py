"""Every sentence a user may read is translated, and stands in the source where the catalogue can find it.

When one of these fails after you wrote or changed a message: run `make messages`, translate what it lists in
src/afina/locale/es/LC_MESSAGES/afina.po, run it again, and commit both files of that folder.
"""

import ast
import gettext
import io
import re
import string
import sys
from importlib import util
from pathlib import Path

import jinja2
import jinja2.nodes
import pytest

from afina import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "afina"
FILES = sorted(PACKAGE.rglob("*.py"))
TEMPLATES = sorted(path for path in PACKAGE.rglob("*.jinja") if "bundled" not in path.parts)
REMEDY = "run `make messages`, translate, run it again"

TRANSLATED_ELSEWHERE = {
    "recipe/explain.py",  # help of a key: from the schema, which tools/messages.py reads
    "recipe/starter.py",  # the same, as comments of a starter
}
"""Where `_()` may be given a variable: its texts reach the catalogue by another way."""
FAMILY = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.AfinaError)
}
SHOWN = {"line", "heading", "warn", "progress"}
"""Methods of the console whose first argument people read."""
NAMES = {"afina", "Afina"}
"""Words that stay as they are in every language."""


def tool():
    """tools/messages.py, which is no part of the package."""
    spec = util.spec_from_file_location("messages", ROOT / "tools" / "messages.py")
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


messages = tool()


@pytest.fixture(scope="module")
def found():
    return messages.gather()


@pytest.fixture(scope="module")
def known():
    return messages.read()


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def each_file(function):
    return pytest.mark.parametrize("path", FILES, ids=relative)(function)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]


def is_gettext(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_"


def untranslated(node: ast.AST | None) -> bool:
    """Whether an expression shows words of its own that did not go through `_()`."""
    if node is None or is_gettext(node):
        return False
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and any(
            word.strip(string.punctuation).isalpha() and word.strip(string.punctuation) not in NAMES
            for word in node.value.split()
        )
    if isinstance(node, ast.JoinedStr):
        return any(untranslated(part) for part in node.values if isinstance(part, ast.Constant))
    if isinstance(node, ast.BinOp):
        return untranslated(node.left) or untranslated(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"format", "join"}:
        return untranslated(node.func.value)
    if isinstance(node, ast.IfExp | ast.BoolOp):
        parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
        return any(untranslated(part) for part in parts)
    return False


def test_every_message_is_translated(found, known):
    lacking = [
        message.id for message in found if message.id and not (known.get(message.id) and known[message.id].string)
    ]
    assert not lacking, REMEDY
    unsure = [message.id for message in known if message.id and message.fuzzy]
    assert not unsure, f"confirm these and take away `fuzzy`: {REMEDY}"


def test_nothing_is_translated_in_vain(found, known):
    assert not [message.id for message in known if message.id and message.id not in found], REMEDY


def test_the_files_are_what_the_tool_writes(found, known):
    assert messages.PO.read_bytes() == messages.as_po(messages.merge(known, found)), REMEDY
    assert messages.MO.read_bytes() == messages.as_mo(messages.read()), f"afina.mo is stale: {REMEDY}"


def test_gettext_reads_what_is_compiled(known):
    with messages.MO.open("rb") as file:
        compiled = gettext.GNUTranslations(file)
    for message in known:
        if message.id and message.string and not message.fuzzy:
            assert compiled.gettext(message.id) == message.string


def test_translations_keep_their_placeholders(known):
    """Same names, formats and conversions; a text that is never formatted may hold any braces."""
    wrong = {}
    for message in known:
        if message.id and message.string and not message.fuzzy:
            try:
                expected = messages.placeholders(message.id)
            except ValueError:
                continue
            if messages.placeholders(message.string) != expected:
                wrong[message.id] = message.string
    assert not wrong


def test_translations_keep_their_shape(known):
    """The same space at both ends and the same full stop, so that sentences can be put together in both languages."""
    for message in known:
        if message.id and message.string:
            english, spanish = message.id, message.string
            assert english[:1].isspace() == spanish[:1].isspace() and english[-1:].isspace() == spanish[-1:].isspace()
            assert english.endswith(".") == spanish.endswith("."), (english, spanish)
            assert english.endswith(":") == spanish.endswith(":"), (english, spanish)
            assert english.count("\n") == spanish.count("\n"), (english, spanish)
            assert english.count("`") == spanish.count("`"), (english, spanish)


def test_the_check_of_the_tool_notices_a_new_message(found, known):
    """A test of these tests: a message nobody translated is listed, and one that changed a little is fuzzy."""
    found = messages.gather()
    found.add("The moon is made of {cheese}.")
    found.add("{path} exists already!")
    merged = messages.merge(known, found)
    assert "The moon is made of {cheese}." in messages.unfinished(merged)
    assert not merged["{path} exists already!"].string  # its neighbour is still in use, so it lends nothing
    old = messages.read()
    old.add("The moon was made of {cheese}.", "La luna era de {cheese}.")
    merged = messages.merge(old, found)
    assert merged["The moon is made of {cheese}."].fuzzy
    assert "The moon is made of {cheese}." in messages.unfinished(merged)
    compiled = gettext.GNUTranslations(io.BytesIO(messages.as_mo(merged)))
    assert compiled.gettext("The moon is made of {cheese}.") == "The moon is made of {cheese}."


@each_file
def test_messages_are_constants(path: Path):
    for call in calls(path):
        if is_gettext(call):
            constant = len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and not call.keywords
            assert constant or relative(path) in TRANSLATED_ELSEWHERE, (
                f"{relative(path)}:{call.lineno}: _() takes one constant string; format afterwards"
            )


@each_file
def test_messages_are_given_what_they_name(path: Path):
    """`_("{a}").format(a=...)`: neither more nor fewer names than the text has."""
    for call in calls(path):
        if not (isinstance(call.func, ast.Attribute) and call.func.attr == "format" and is_gettext(call.func.value)):
            continue
        text = call.func.value.args[0]
        if isinstance(text, ast.Constant) and all(keyword.arg for keyword in call.keywords):
            named = {name.partition(".")[0].partition("[")[0] for name, _spec, _c in messages.placeholders(text.value)}
            assert named == {keyword.arg for keyword in call.keywords}, f"{relative(path)}:{call.lineno}"
            assert not call.args


@each_file
def test_what_users_read_is_translated(path: Path):
    for call in calls(path):
        where = f"{relative(path)}:{call.lineno}"
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        first = call.args[0] if call.args else None
        if name in FAMILY:
            assert not untranslated(first), f"{where}: {name} with words outside _()"
            hint = next((keyword.value for keyword in call.keywords if keyword.arg == "hint"), None)
            assert not untranslated(hint), f"{where}: a hint outside _()"
        if name in {"Option", "Argument", "command", "Typer"}:
            text = next((keyword.value for keyword in call.keywords if keyword.arg == "help"), None)
            assert not untranslated(text), f"{where}: help outside _()"
        if name in SHOWN and isinstance(call.func, ast.Attribute) and "console" in ast.unparse(call.func.value):
            assert not untranslated(first), f"{where}: console.{name} with words outside _()"


@pytest.mark.parametrize("path", TEMPLATES, ids=relative)
def test_templates_give_constants_too(path: Path):
    parsed = jinja2.Environment(autoescape=True).parse(path.read_text("utf-8"))
    asked = [node for node in parsed.find_all(jinja2.nodes.Call) if getattr(node.node, "name", "") == "_"]
    assert asked, "a page without a translated word"
    for node in asked:
        assert len(node.args) == 1 and isinstance(node.args[0], jinja2.nodes.Const), f"{relative(path)}:{node.lineno}"
    shown = re.sub(r"(?s)<style.*?</style>|<!--.*?-->|{#.*?#}|{{.*?}}|{%.*?%}", " ", path.read_text("utf-8"))
    shown = re.sub(r"(?s)<[^>]*>|&\w+;", " ", shown)
    assert not [word for word in shown.split() if word.isalpha() and len(word) > 2 and word not in NAMES]


def test_the_finder_of_untranslated_words_finds():
    for source, expected in {
        "'Broken file'": True,
        "f'{name} broken'": True,
        "'{path} is gone'.format(path=p)": True,
        "_('Broken') if x else 'nothing else'": True,
        "'one' + _('two')": True,
        "_('Broken file').format(a=1)": False,
        "message": False,
        "f'{name}: {value}'": False,
        "'  ' + text": False,
    }.items():
        assert untranslated(ast.parse(source, mode="eval").body) is expected, source
