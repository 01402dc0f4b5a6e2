"""The command line as a user has it: inside this process where that is enough, a process of its own where it is not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from journey.tiny import lay_out

from afina.cli.main import main
from afina.console import console

COMMAND = [sys.executable, "-m", "afina"]


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """With --json: every line of stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def afina(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Finished]]:
    """Run `afina ...` in this process, as `main` does."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["afina", *map(str, arguments)])
        monkeypatch.setattr(console, "json", False)
        monkeypatch.setattr(console, "debug", False)
        monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest keeps its own
        monkeypatch.setattr("afina.cli.main._end", sys.exit)  # and goes on
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return Finished(int(ended.value.code or 0), printed.out, printed.err)

    yield run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, data and recipe.yaml; tests that spoil something do so in a folder of their own."""
    folder = tmp_path_factory.mktemp("world")
    lay_out(folder)
    return folder


@pytest.fixture
def start(world: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `afina ...` as a process of its own."""

    def popen(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=world,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen
