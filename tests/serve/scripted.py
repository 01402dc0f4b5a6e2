"""Speakers and models whose answers are known beforehand, and a program that talks to one: for pipes and terminals."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from afina.console import console
from afina.data.conversation import Message
from afina.errors import AfinaError
from afina.recipe.schema import Chat
from afina.serve.session import Session
from afina.serve.terminal import answer_once, chat


class Echo:
    """Says the last question back, word by word. Counts a word as a token and a message as one more.

    Asked to `count`, it counts for twenty seconds; `hostile` drives the terminal.
    """

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.heard: list[tuple[Message, ...]] = []
        self.seeds: list[int] = []
        self.settings: list[Chat] = []

    def length(self, messages: Sequence[Message]) -> int:
        return sum(1 + len(message.content.split()) for message in messages)

    def answer(
        self, messages: Sequence[Message], settings: Chat, seed: int, on_text: Callable[[str], bool | None]
    ) -> str:
        self.heard.append(tuple(messages))
        self.seeds.append(seed)
        self.settings.append(settings)
        said = ""
        for word in self.words(messages[-1].content):
            said += word
            if on_text(word):
                break
        return said

    def words(self, question: str) -> Any:
        if question == "count":
            for number in range(400):
                yield f"{number} "
                time.sleep(0.05)
        elif question == "hostile":
            yield "red \x1b[31m\x07end\x9b"
        else:
            yield from (f"{word} " for word in question.split())
            yield f"({self.name})"


def main() -> int:
    """Arguments: names of speakers, `--json`, `--once QUESTION`."""
    arguments = sys.argv[1:]
    if console_json := "--json" in arguments:
        arguments.remove("--json")
    console.json = console_json
    once = arguments.pop() if "--once" in arguments else None
    names = [name for name in arguments if name != "--once"]
    session = Session([Echo(name) for name in names], Chat(max_new_tokens=8), limit=40)
    try:
        chat(session, console) if once is None else answer_once(session, once, console)
    except AfinaError as error:
        console.error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
