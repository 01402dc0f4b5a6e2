"""Names become places; a hub that is not there is found out once, before anybody waits for it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from afina.hub import look_for_hub
from afina.recipe.place import BUNDLED, model_source, schema_file

ASK = """
import sys
from afina.recipe.place import model_source
if sys.argv[1] == "before":
    import huggingface_hub
model_source("nobody/nothing", __import__("pathlib").Path())
from huggingface_hub.constants import is_offline_mode
print(is_offline_mode())
"""
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def asked(endpoint: str, when: str = "after", **variables: str) -> str:
    """Whether the hub's library asks nobody after a hub's name was met, in a process of its own."""
    known = {name: value for name, value in os.environ.items() if name not in (*PROXIES, "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, when],
        env={**known, "HF_ENDPOINT": endpoint, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"  # closed again


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hub_that_is_not_there_is_not_asked(nobody, when):
    assert asked(nobody, when) == "True"


def test_a_hub_that_is_there_is_asked(port, nobody):
    assert asked(f"http://127.0.0.1:{port}") == "False"
    assert asked(nobody, https_proxy="http://127.0.0.1:9") == "False"


def test_who_wants_no_hub_has_none(monkeypatch, port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not look_for_hub()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    assert look_for_hub()


def test_folders_come_before_names(tmp_path: Path, monkeypatch):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert model_source("mine/model", tmp_path) == str((tmp_path / "mine" / "model").resolve())
    assert model_source("afina/tiny", tmp_path) == str(BUNDLED / "tiny")
    assert schema_file("schema.json", tmp_path) == tmp_path / "schema.json"
    assert schema_file("afina/bot-configurator/schema.json", tmp_path).is_file()
    (tmp_path / "afina").mkdir()
    (tmp_path / "afina" / "own.json").write_text("{}")
    assert schema_file("afina/own.json", tmp_path) == tmp_path / "afina" / "own.json"
