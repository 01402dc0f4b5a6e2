"""Translation against a small honest server: it speaks the protocol, keeps count, and fails when it is told to."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import afina
from afina import translation
from afina.data import translate as room
from afina.data.conversation import Message, Sample, packed, row_of
from afina.data.translate import Cache, Job, estimate, translate
from afina.errors import RecipeError
from afina.model.endpoint import EndpointError


class Server:
    """Translates by writing every word backwards; marks stay. `script` says what the first requests get instead."""

    def __init__(self, port: int = 0) -> None:
        self.seen: Counter[str] = Counter()
        self.script: list[object] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most = 0
        self.hold_after: int | None = None
        self.held, self.go_on = threading.Event(), threading.Event()
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][1]["content"]
                with lock:
                    server.seen[text] += 1
                    server.keys.add(self.headers["Authorization"])
                    server.at_once += 1
                    server.most = max(server.most, server.at_once)
                    said = server.script.pop(0) if server.script else 200
                    hold = server.hold_after is not None and server.seen.total() > server.hold_after
                if hold:
                    server.held.set()
                    server.go_on.wait(90)
                status, content = (said, b"busy") if isinstance(said, int) and said != 200 else (200, b"")
                if status == 200:
                    words = said if isinstance(said, str) else server.reversed(text)
                    choice = {"message": {"content": words}, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 10, "completion_tokens": 5}
                    content = json.dumps({"choices": [choice], "usage": usage}).encode()
                with suppress(OSError):  # whoever asked may be gone
                    self.answer(status, content)
                with lock:
                    server.at_once -= 1

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def reversed(text: str) -> str:
        return " ".join(word if "⟦" in word else word[::-1] for word in text.split(" "))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(translation, "PATIENCE", (0.01,) * 4)
    monkeypatch.setenv("KEY", "secret")


JOB = Job("en", "es", "test")


def samples(count: int = 6) -> list[Sample]:
    return [
        Sample(
            (
                Message("user", f"What does number {n} in `f({n})` do?\n\n```\nleave me\n```\n\nSay it shortly."),
                Message("assistant", f"It adds {n} to one number.", 0.5, packed({"thinking": "as it was"})),
            ),
            Path("talk.jsonl"),
            n + 1,
        )
        for n in range(count)
    ]


def run(rows, cache, endpoint, parallel=3):
    done = []
    try:
        return translate(
            rows, JOB, cache, translation._asking(*endpoint), parallel=parallel, on_progress=done.append
        ), sum(done)
    finally:
        cache.close()


def test_rows_are_translated_and_code_stays(server, tmp_path):
    rows, cache = samples(), Cache(tmp_path / "cache.jsonl")
    left = estimate(rows, JOB, cache)
    assert (left.rows, left.units, left.cached) == (6, 13, 0)  # "Say it shortly." once
    assert left.tokens[0] > 13 * 90 and left.price((1.0, 2.0)) > 0
    outcome, done = run(rows, cache, (server.url, "m", "KEY"))
    assert not outcome.kept_back and len(outcome.samples) == 6 and done == left.characters
    first = outcome.samples[0].messages
    assert first[0].content == "tahW seod rebmun 0 ni `f(0)` ?od\n\n```\nleave me\n```\n\nyaS ti .yltrohs"
    assert (first[1].weight, first[1].details) == (0.5, {"thinking": "as it was"})
    assert outcome.tokens == (130, 65)
    assert set(server.seen.values()) == {1} and server.keys == {"Bearer secret"} and server.most <= 3
    again = Cache(tmp_path / "cache.jsonl")
    assert estimate(rows, JOB, again).units == 0
    assert run(rows, again, ("http://127.0.0.1:1", "m", ""))[0].samples == outcome.samples


def test_a_server_that_dies_half_way_loses_nothing(server, tmp_path):
    rows = samples(12)
    server.script = [200] * 7 + [500] * 1000
    with pytest.raises(EndpointError, match="gave no answer"):
        run(rows, Cache(tmp_path / "cache.jsonl"), (server.url, "m", ""), parallel=1)
    server.stop()
    with (tmp_path / "cache.jsonl").open("ab") as file:
        file.write(b'{"key": "ha')  # as a kill leaves it
    other = Server()
    try:
        cache = Cache(tmp_path / "cache.jsonl")
        assert len(server.seen) >= 8
        assert estimate(rows, JOB, cache).cached == 7
        outcome, _done = run(rows, cache, (other.url, "m", ""))
        assert len(outcome.samples) == 12 and not outcome.kept_back
        assert sum(other.seen.values()) == 25 - 7  # what was paid for is not asked again
    finally:
        other.stop()


def test_what_breaks_in_a_thread_is_raised_and_nobody_waits_for_it(tmp_path):
    def ask(*_arguments):
        raise AttributeError("odd")

    cache = Cache(tmp_path / "cache.jsonl")
    with pytest.raises(AttributeError, match="odd"):
        translate(samples(2), JOB, cache, ask, parallel=2, on_progress=lambda done: None)
    cache.close()


def test_it_is_asked_again_when_busy_and_when_marks_are_lost(server, tmp_path):
    server.script = [429, 503, "no marks here", 200]
    outcome, _done = run(samples(1)[:1], Cache(tmp_path / "cache.jsonl"), (server.url, "m", ""), parallel=1)
    assert not outcome.kept_back
    assert max(server.seen.values()) == 4


def test_a_row_whose_marks_are_lost_is_kept_back_and_named(server, tmp_path):
    server.script = ["lost"] * 3
    outcome, _done = run(samples(2), Cache(tmp_path / "cache.jsonl"), (server.url, "m", ""), parallel=1)
    assert [sample.line for sample in outcome.samples] == [2]
    assert [(problem.line, "marks" in problem.reason) for problem in outcome.kept_back] == [(1, True)]


def test_a_row_into_which_code_came_is_kept_back(server, tmp_path):
    server.script = [200, 200, "It `adds` 0"]
    outcome, _done = run(samples(2), Cache(tmp_path / "cache.jsonl"), (server.url, "m", ""), parallel=1)
    assert [sample.line for sample in outcome.samples] == [2]
    assert "adds" in outcome.kept_back[0].reason


def test_refusals_and_redirects_end_the_work_at_once(server, tmp_path):
    for status in (401, 404, 302):
        server.script = [status]
        with pytest.raises(EndpointError, match=str(status)):
            run(samples(1), Cache(tmp_path / f"{status}.jsonl"), (server.url, "m", "KEY"), parallel=1)
    assert sum(server.seen.values()) == 3


@pytest.mark.parametrize(
    ("url", "key"),
    [("ftp://x/v1", ""), ("localhost:80", ""), ("http://github.com/v1", "KEY"), ("", "")],
)
def test_addresses_that_are_not_taken(url, key):
    with pytest.raises(RecipeError):
        translation._asking(url, "m", key)


def test_another_language_or_translator_is_another_entry():
    (unit,) = [part for part in room.parts("some words") if not isinstance(part, str)]
    assert len({Job(*job).key(unit) for job in (("en", "es", "a"), ("en", "fr", "a"), ("en", "es", "b"))}) == 3


def started(tmp_path, server, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "afina", "data", "translate", "rows.jsonl", "--out", "rows.es.jsonl"]
    command += ["--endpoint", server.url, "--model", "m", "--parallel", "1", *more]
    env = {**os.environ, "PYTHONPATH": str(Path(afina.__file__).parents[1])}
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on_where_it_was(server, tmp_path, stop):
    """Ctrl-C, a polite end and a kill: what was answered is kept, the status says why, and nothing is asked twice."""
    rows = [row_of(sample) for sample in samples(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    server.hold_after = 7
    process = started(tmp_path, server)
    try:
        assert server.held.wait(120), process.communicate(timeout=9)
        process.send_signal(stop)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        server.hold_after = None
        server.go_on.set()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    assert stop is signal.SIGKILL or "what is translated so far is kept" in said.replace("\n", " ")
    assert not (tmp_path / "rows.es.jsonl").exists()
    kept = (tmp_path / "rows.es.cache.jsonl").read_bytes()
    assert kept.count(b"\n") == 7
    process = started(tmp_path, server)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "12 rows = 12 translated + 0 kept back" in out.replace("\n", " ")
    assert (tmp_path / "rows.es.cache.jsonl").read_bytes().startswith(kept)
    again = [text for text, count in server.seen.items() if count > 1]
    assert len(again) <= 1  # what was under way when it ended
    assert len((tmp_path / "rows.es.jsonl").read_text("utf-8").splitlines()) == 12
