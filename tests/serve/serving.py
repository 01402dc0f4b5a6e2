"""A real server process, and what it wrote: `with served(...) as server`."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI


@dataclass
class Server:
    """`url` ends in /v1; `log` is its standard output, JSON lines."""

    process: subprocess.Popen
    log: Path
    url: str = ""

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text("utf-8").splitlines() if line.endswith("}")]
        return [event for event in found if event["event"] == name]

    def client(self, key: str = "unused", **more: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **more)

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def raw(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any], Any]:
        """Status, headers and JSON of one request, exactly as given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Content-Type": "application/json", **{name.replace("_", "-"): one for name, one in headers.items()}}
        try:
            connection.request(method, path, body, given)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), json.loads(response.read())
        finally:
            connection.close()

    def answers(self) -> int:
        """Places that are taken."""
        return self.raw("GET", "/health")[2]["answers"]

    def calms(self, seconds: float = 10.0) -> bool:
        """Whether all places are free again, soon."""
        until = time.monotonic() + seconds
        while (taken := self.answers()) and time.monotonic() < until:
            time.sleep(0.02)
        return not taken

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def start(*arguments: object, log: Path, **environment: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "AFINA_"))}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AFINA_LANG": "en", **environment}
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        command = [sys.executable, "-m", "afina", "serve", *map(str, arguments), "--json", "--port", "0"]
        return subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=kept)


@contextmanager
def served(*arguments: object, **environment: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = Server(start(*arguments, log=log, **environment), log)
        try:
            until = time.monotonic() + 120
            while not server.events("serving"):
                assert server.process.poll() is None, log.with_suffix(".err").read_text() + log.read_text()
                assert time.monotonic() < until, "it does not start"
                time.sleep(0.05)
            server.url = server.events("serving")[0]["url"]
            yield server
            assert "Traceback" not in log.with_suffix(".err").read_text("utf-8")
        finally:
            server.process.kill()
            server.process.wait()
