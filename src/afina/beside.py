"""Work that goes on beside the main one: hashing and reading files, which Python's lock does not hold up."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def begun(work: Callable[[], T]) -> Future[T]:
    """`work`, begun in a thread; `result()` waits for what it returns, or raises what it raised.

    A program that ends before, because of an error or a signal, does not wait for it.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    return found
