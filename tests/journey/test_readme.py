"""The READMEs can be followed: their commands parse, their recipes, overrides and links exist, both say the same."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import afina
from afina.cli.main import app
from afina.recipe.load import load
from afina.recipe.starter import create_project

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.es.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDED = re.compile(r"^\|[^|]*\| `([^`]*=[^`]*)` \|$", re.MULTILINE)


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text(name)) if kind == language]


def commands(name: str) -> list[list[str]]:
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parsed(words: list[str]) -> dict[str, object]:
    """What the command line makes of `afina ...`, without doing it."""
    group = typer.main.get_command(app)
    verb = group.commands[words[1]]  # type: ignore[attr-defined]
    return verb.make_context(words[1], words[2:]).params


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The folder that `afina init` of the README makes, entered as the README says."""
    create_project(tmp_path / "my-tutor", "custom")
    monkeypatch.chdir(tmp_path / "my-tutor")
    return tmp_path / "my-tutor"


@pytest.mark.parametrize("name", READMES)
def test_every_command_can_be_typed(name, project):
    seen = []
    for words in commands(name):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", text("Makefile"), re.MULTILINE)
        elif words[0] == "source":
            assert words[1] == ".venv/bin/activate"  # where the Makefile puts it
        elif words[0] == "cd":
            assert words[1] == project.name
        else:
            assert words[0] == "afina"
            given = parsed(words)
            seen.append(words[1])
            if words[1] == "run":
                assert load(Path(str(given["recipe"])), list(given["overrides"])).name == project.name
            if words[1] == "chat":
                assert given["source"] == f"runs/{project.name}"
    assert seen[:5] == ["init", "init", "plan", "run", "chat"]


@pytest.mark.parametrize("name", READMES)
def test_every_override_of_the_table_is_one(name, project):
    run = next(words for words in commands(name) if words[:2] == ["afina", "run"])
    rows = ADDED.findall(text(name))
    assert len(rows) == 4
    for row in rows:
        load(project / "recipe.yaml", [*run[3:], *row.split()])


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", text(name)):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_the_python_calls_what_there_is(name):
    for block in blocks(name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "afina":
                assert node.attr in afina.__all__


def test_the_commands_of_the_demo_are_the_ones_it_prints():
    """What the demo's last screen tells the user to try parses too."""
    for name in READMES:
        shown = blocks(name, "text")[0]
        tried = [shlex.split(line) for line in shown[shown.index("Try next") :].splitlines()[1:]]
        assert len(tried) == 3
        for words in tried:
            parsed(words)


def test_both_languages_say_the_same():
    english, spanish = READMES
    assert commands(english) == commands(spanish)
    assert blocks(english, "python") == blocks(spanish, "python")
    assert ADDED.findall(text(english)) == ADDED.findall(text(spanish))
    assert blocks(english, "text")[0] == blocks(spanish, "text")[0]
    links = [re.findall(r"\]\(([^)]+)\)", text(name)) for name in READMES]
    assert [link for link in links[0] if link != spanish] == [link for link in links[1] if link != english]


def test_recipes_begin_with_the_command_that_runs_them():
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        first = file.read_text("utf-8").splitlines()[0]
        assert first == f"# afina run recipes/{file.name}"
        parsed(shlex.split(first.removeprefix("# ")))


def test_exit_statuses_are_those_of_the_errors():
    from afina import errors

    page = text("docs/exit-status.md")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AfinaError)]
    for status in {kind.exit_status for kind in kinds}:
        assert f"| {status} |" in page
    assert errors.Interrupted("", signal_number=2).exit_status == 130
