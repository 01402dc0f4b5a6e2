"""What goes to a hub is what was asked for and nothing else; and a program called ollama is handed the Modelfile."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from journey.tiny import lay_out

import afina
from afina.console import Console
from afina.errors import AfinaError, OutputError, RecipeError
from afina.export.ollama import create_in_ollama
from afina.export.push import chosen_files, push_files


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    return Path(afina.train(folder / "recipe.yaml", folder / "run", ["training.steps=2", "tasks=[]"]))


class Hub(BaseHTTPRequestHandler):
    """A hub of one machine: makes repositories, wants every file whole, keeps what is committed."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 (shared on purpose)

    def do_POST(self) -> None:
        body = self.whole_body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            if name.startswith("others/"):
                return self.answer(403, {"error": "not yours"})
            self.repositories.setdefault(name, {})
            return self.answer(200, {"url": f"https://huggingface.co/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
            )
        for line in body.decode().splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                self.repositories[name][record["value"]["path"]] = base64.b64decode(record["value"]["content"])
        return self.answer(
            200, {"commitUrl": f"https://huggingface.co/{name}/commit/1", "commitOid": "1", "success": True}
        )

    def whole_body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, said: dict[str, Any]) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_given: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "none")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_arrives_is_what_was_named(run: Path, hub: str) -> None:
    files = chosen_files(run, ["adapter"])
    assert push_files(files, "me/opinions", endpoint=hub) == "https://huggingface.co/me/opinions/commit/1"
    arrived = Hub.repositories["me/opinions"]
    assert arrived == {place: path.read_bytes() for place, path in files}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(arrived)
    assert not any("recipe" in place or "metrics" in place or "manifest" in place for place in arrived)
    assert b"Licence" in arrived["README.md"]


def test_refusals_are_told(run: Path, hub: str) -> None:
    with pytest.raises(OutputError, match="did not take"):
        push_files(chosen_files(run, ["adapter"]), "others/opinions", endpoint=hub)
    with pytest.raises(OutputError, match="did not take"):
        push_files(chosen_files(run, ["adapter"]), "no name at all", endpoint=hub)
    with pytest.raises(OutputError, match="did not take"):
        push_files(chosen_files(run, ["adapter"]), "me/opinions", endpoint="http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="not exported yet"):
        chosen_files(run, ["gguf"])


def test_a_dry_run_sends_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from afina import pipeline

    pipeline.push(run, "me/nothing", dry_run=True)
    assert "adapter_model.safetensors" in capsys.readouterr().out
    assert "me/nothing" not in Hub.repositories


def test_a_changed_file_is_not_sent(run: Path) -> None:
    card = run / "README.md"
    before = card.read_bytes()
    card.write_bytes(before + b"!")
    try:
        with pytest.raises(AfinaError):
            chosen_files(run, ["adapter"])
    finally:
        card.write_bytes(before)


OLLAMA = """#!{python}
import json, os, sys
open({record!r}, "w").write(json.dumps([sys.argv[1:], os.getcwd(), open("Modelfile").read()]))
sys.exit(int({status}))
"""


@pytest.mark.parametrize("status", [0, 1])
def test_ollama_is_handed_the_modelfile_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    (tmp_path / "Modelfile").write_text("FROM ./a.gguf\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert not create_in_ollama(tmp_path, "My model", Console())
    assert "ollama create my-model -f Modelfile" in capsys.readouterr().out
    (tmp_path / "bin").mkdir()
    program, record = tmp_path / "bin" / "ollama", tmp_path / "record"
    program.write_text(OLLAMA.format(python=sys.executable, record=str(record), status=status))
    program.chmod(0o755)
    assert create_in_ollama(tmp_path, "My model", Console()) == (status == 0)
    arguments, place, text = json.loads(record.read_text())
    assert arguments == ["create", "my-model", "-f", "Modelfile"]
    assert Path(place).samefile(tmp_path) and text == "FROM ./a.gguf\n"
    assert ("ollama run my-model" in capsys.readouterr().out) == (status == 0)
