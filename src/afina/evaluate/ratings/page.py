"""A local page to rate on: plain forms, no scripts, this machine only.

It listens on 127.0.0.1 behind a key in its address. A request with another host name (DNS rebinding), without the key,
or from another page is refused. One thread a request; the store takes care of itself.
"""

import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afina.errors import AfinaError
from afina.evaluate.ratings.questions import Round, role_named
from afina.language import _, chosen

FORM_BYTES = 4096
SLOWEST_S = 3600.0


class Page:
    """Serves one rater's questions until it is closed. `url` is what to open in a browser."""

    def __init__(self, questions: Round, port: int = 0, on_rating: Callable[[], None] = lambda: None) -> None:
        self._round, self._on_rating = questions, on_rating
        self._key = secrets.token_urlsafe(16)
        self._shown: dict[str, float] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The page's address, key included."""
        return f"http://127.0.0.1:{self._server.server_port}/{self._key}/"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def admits(self, path: str, host: str, origin: str | None) -> bool:
        """Whether a request comes from the page itself, on this machine."""
        here = f"127.0.0.1:{self._server.server_port}"
        if host not in (here, here.replace("127.0.0.1", "localhost")) or path != f"/{self._key}/":
            return False
        return origin is None or origin == f"http://{host}"

    def html(self) -> str:
        """The next question, or thanks."""
        question = self._round.next()
        if question is not None:
            self._shown[question.item.key] = time.monotonic()
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("page.html.jinja").render(
            _=_,
            role_named=role_named,
            language=chosen(),
            question=question,
            rater=self._round.rater,
            total=len(self._round.items),
        )

    def take(self, form: str) -> bool:
        """Keep what a form says; False for what is no rating."""
        fields = parse_qs(form, max_num_fields=10)
        key, choice = (fields.get(name, [""])[0] for name in ("item", "choice"))
        question = self._round.find(key)
        value = None if question is None else question.value_of(choice)
        if question is None or value is None:
            return False
        seconds = min(SLOWEST_S, time.monotonic() - self._shown.get(key, time.monotonic()))
        self._round.keep(question, value, seconds)
        self._on_rating()
        return True


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._admitted():
                self._reply(HTTPStatus.OK, page.html())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._admitted():
                return
            if not length.isdigit() or int(length) > FORM_BYTES:
                self._reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "")
                return
            try:
                taken = page.take(self.rfile.read(int(length)).decode("utf-8", "replace"))
            except (AfinaError, ValueError) as error:
                self._reply(HTTPStatus.BAD_REQUEST, str(error))
                return
            if not taken:
                self._reply(HTTPStatus.BAD_REQUEST, "")
                return
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _admitted(self) -> bool:
            if page.admits(self.path, self.headers.get("Host", ""), self.headers.get("Origin")):
                return True
            self._reply(HTTPStatus.NOT_FOUND, "")
            return False

        def _reply(self, status: HTTPStatus, text: str) -> None:
            content = text.encode("utf-8", "replace")
            self.send_response(status)
            kind = "text/html" if text.startswith("<!doctype") else "text/plain"
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "same-origin")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header(
                "Content-Security-Policy",
                "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
            )
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Nothing is printed."""

    return Handler
