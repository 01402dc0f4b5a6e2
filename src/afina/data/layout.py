"""What a chat template writes around the contents of one sequence of roles, found with placeholders in their place."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the template writes around the contents of one sequence of roles.

    `order`: the messages in the order in which their contents appear. `literals[i]` stands before the i-th of these,
    the last one after all; there are none when a content is missing or written twice. `leads`: per message, how many
    characters before its content the model takes over. `control`: how many control tokens there are in all.
    """

    order: tuple[int, ...]
    literals: tuple[str, ...]
    leads: tuple[int, ...]
    control: int

    def find(self, text: str, rows: Rows) -> list[Span] | None:
        """Where each content stands in `text`, as it is or stripped; None when `text` is not laid out so."""
        if not self.literals or not text.startswith(self.literals[0]):
            return None
        found: dict[int, Span] = {}
        position = len(self.literals[0])
        for place, literal in zip(self.order, self.literals[1:], strict=True):
            content = rows[place]["content"]
            for form in (content, content.strip()):
                end = position + len(form)
                if text.startswith(form, position) and text.startswith(literal, end):
                    break
            else:
                return None
            found[place] = (position, end)
            position = end + len(literal)
        return [found[place] for place in range(len(rows))] if position == len(text) else None


def laid_out(roles: Sequence[str], render: Callable[..., str], controls: re.Pattern[str], *, prompt: bool) -> Layout:
    """The layout that `render` has for these roles. Raises what `render` raises."""
    rows = [{"role": role, "content": f"\ue0f4{place}\ue0f5"} for place, role in enumerate(roles)]
    text = render(rows, prompt=prompt)
    matches = list(re.finditer("\ue0f4([0-9]+)\ue0f5", text))
    order = tuple(int(match.group(1)) for match in matches)
    literals: tuple[str, ...] = ()
    leads = [0] * len(roles)
    if sorted(order) == list(range(len(roles))):
        edges = [0, *(edge for match in matches for edge in match.span()), len(text)]
        literals = tuple(text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))
        for place, match in zip(order, matches, strict=True):
            leads[place] = _lead(text[: match.start()], rows, place, render)
    return Layout(order, literals, tuple(leads), len(controls.findall(text)))


def _lead(text: str, rows: Rows, place: int, render: Callable[..., str]) -> int:
    """How many characters the model writes between taking over and the content of answer `place`, after `text`."""
    if rows[place]["role"] != "assistant" or place == 0:
        return 0
    before = render(rows[:place], prompt=True)
    return len(text) - len(before) if text.startswith(before) else 0
