"""Work that goes on beside the main one: hashing, reading, waiting, which Python's lock does not hold up."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
LISTEN_S = 0.1
"""A signal that comes between the last line of Python and a wait does not end the wait: so it ends by itself."""


def begun(work: Callable[[], T]) -> Future[T]:
    """`work`, begun in a thread; `result()` waits for what it returns, or raises what it raised.

    A program that ends before waits for it: Python, taking itself down, would end a thread in the middle of C++, and
    with it the process. The command line does not wait, as it leaves without taking anything down.
    """
    found: Future[T] = Future()
    Thread(target=_do, args=(work, found)).start()
    return found


def each(work: Callable[[S], T], items: Iterable[S], at_once: int) -> Iterator[tuple[S, T]]:
    """Every item with what `work` makes of it, as it comes; so many are worked on at once.

    Raises what `work` raises; then, or when whoever asks leaves, no further item is begun, and those under way are not
    waited for: an endpoint may take minutes to answer, and Ctrl-C should not.
    """
    left: SimpleQueue[S] = SimpleQueue()
    found: SimpleQueue[tuple[S, Future[T]]] = SimpleQueue()
    over = Event()
    for item in items:
        left.put(item)
    count = left.qsize()

    def go_on(others: int) -> None:
        if others > 0:  # one begins the next, so that no signal meets the main thread in the middle of beginning some
            Thread(target=go_on, args=(others - 1,), daemon=True).start()
        with suppress(Empty):
            while not over.is_set():
                item = left.get_nowait()
                made: Future[T] = Future()
                _do(partial(work, item), made)
                if made.exception() is not None:
                    over.set()
                found.put((item, made))

    Thread(target=go_on, args=(min(at_once, count) - 1,), daemon=True).start()
    try:
        for _item in range(count):
            item, made = next_of(found)
            yield item, made.result()
    finally:
        over.set()


def _do(work: Callable[[], T], found: Future[T]) -> None:
    try:
        found.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
        found.set_exception(error)


def next_of(found: SimpleQueue[T]) -> T:
    """What comes next; a signal's handler may raise here."""
    while True:
        with suppress(Empty):
            return found.get(timeout=LISTEN_S)
