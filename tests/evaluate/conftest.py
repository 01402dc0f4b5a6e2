"""Endpoints that answer as a test says."""

from collections.abc import Callable, Iterator

import pytest
from endpoint_server import Server


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict], tuple[int, bytes]]], Server]]:
    """Start servers, each with its own reply; they end with the test."""
    servers: list[Server] = []

    def start(reply: Callable[[dict], tuple[int, bytes]]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
