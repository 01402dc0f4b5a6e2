"""The server: OpenAI's API over HTTP. Knows a desk that answers wishes, and no model.

No request names a file, an address or a template.
"""

import ipaddress
import socket
import time
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from afina import __version__
from afina.errors import AfinaError, ResourceError
from afina.language import _
from afina.serve.answering import Answering
from afina.serve.gate import BODY_BYTES, BODY_S, Gate, House, as_refusal, respond
from afina.serve.openai import ChatRequest, ChatShape, TextRequest, TextShape, refused
from afina.serve.wish import Refusal, unknown

FINISHING_S = 5.0
"""Seconds that answers under way get when the server is stopped."""


def app_of(house: House) -> "Gate":
    """The application."""
    app = FastAPI(title="afina", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _unread)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(AfinaError, _refused)
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "afina"}

    @app.get("/health")
    async def health() -> Response:
        """Whether it answers."""
        said = {"status": "stopping" if house.stopping else "ok", "answers": house.taken, "places": house.places}
        return JSONResponse(said, 503 if house.stopping else 200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Whom one can ask."""
        return {"object": "list", "data": [described(name) for name in house.desk.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in house.desk.models:
            raise unknown(name, house.desk.models)
        return described(name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        """An answer to a conversation."""
        return Answering(house, body.wish(), ChatShape(body.model), body.stream, body.tells_usage)

    @app.post("/v1/completions")
    async def completions(body: TextRequest) -> Response:
        """What goes on after a text."""
        return Answering(house, body.wish(), TextShape(body.model), body.stream, body.tells_usage)

    return Gate(app, house)


async def _refused(_request: Request, error: Any) -> Response:
    return respond(error if isinstance(error, Refusal) else as_refusal(error))


async def _unread(request: Request, error: Any) -> Response:
    shape = ChatRequest if request.scope["path"].endswith("/chat/completions") else TextRequest
    return respond(refused(error.errors()[0], shape.model_fields))


async def _unrouted(request: Request, error: Any) -> Response:
    said = {
        404: _("There is nothing at {path}.").format(path=request.scope["path"][:80]),
        405: _("{path} is not asked by {method}.").format(path=request.scope["path"][:80], method=request.method),
        408: _("The body took more than {seconds:g} s to arrive.").format(seconds=BODY_S),
        413: _("The body is larger than {size} MiB.").format(size=BODY_BYTES >> 20),
    }
    status = error.status_code
    return respond(Refusal(said.get(status, _("The body cannot be read.")), status=status))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. Raises ResourceError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ResourceError(
            _("{host}:{port} cannot be listened on: {reason}.").format(
                host=host, port=port, reason=error.strerror or error
            ),
            hint=_("Another program may have it: take another --port, or 0 for any that is free."),
        ) from error


class _Server(uvicorn.Server):
    """uvicorn's, which tells the desk when it is to stop."""

    def __init__(self, config: uvicorn.Config, house: House) -> None:
        super().__init__(config)
        self._house = house

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal came: those who wait are told so, those being answered get some seconds; a second one ends all."""
        self._house.stopping = True
        self._house.desk.stop(FINISHING_S)
        super().handle_exit(sig, frame)


def serve(house: House, place: socket.socket) -> None:
    """Serve until a signal comes, and raise what it means. `place` is where to listen."""
    config = uvicorn.Config(
        app_of(house),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(FINISHING_S) + 2,
        h11_max_incomplete_event_size=2**14,
    )
    host, port = place.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    names = ", ".join(house.desk.models)
    house.console.line(_("{names} at {url}; Ctrl-C ends.").format(names=names, url=url))
    house.console.event("serving", url=url, models=list(house.desk.models), places=house.places)
    _Server(config, house).run(sockets=[place])
