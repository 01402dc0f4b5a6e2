"""A small honest OpenAI-compatible endpoint: real HTTP, and what it says to each request is up to the test."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """`reply` gets a request's body and gives status and content; `seen`: what came."""

    def __init__(self, reply: Callable[[dict], tuple[int, bytes]]) -> None:
        self.seen: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with suppress(OSError, ValueError):  # whoever asked may be gone, in the middle of a word
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    outer.seen.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                    status, content = reply(body)
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str, finish: str = "stop") -> tuple[int, bytes]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()
