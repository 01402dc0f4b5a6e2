"""A sample token by token, as the model sees it: what is markup, what is learnt; for a terminal or as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment

from afina.data.conversation import Sample
from afina.data.template import Rendered
from afina.data.tokenizer import Tokenizer
from afina.language import _

PARTS = 8
"""No character takes more tokens of bytes than this."""
STYLES = {"text": "", "markup": "magenta", "learnt": "green", "learnt-markup": "bold green"}
"""How each kind is printed."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `text` is "" where its bytes are part of a character that a later token ends."""

    id: int
    text: str
    learnt: bool
    markup: bool

    @property
    def kind(self) -> str:
        """text, markup, learnt or learnt-markup."""
        return f"learnt-{'markup' if self.markup else ''}".rstrip("-") if self.learnt else self._plain

    @property
    def _plain(self) -> str:
        return "markup" if self.markup else "text"


def tokens(row: Rendered, tokenizer: Tokenizer) -> list[Token]:
    """The tokens of a rendered sample; their texts end to end are the whole text."""
    ids, control = row.ids.tolist(), frozenset(tokenizer.markup.values())
    found, begin = [], 0
    for place, (index, learnt) in enumerate(zip(ids, row.learnt.tolist(), strict=True)):
        text = tokenizer.hf.decode(
            ids[begin : place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if begin == place and index in control:
            text = next(text for text, number in tokenizer.markup.items() if number == index)
        whole = not text.endswith("\ufffd") or place - begin >= PARTS or place + 1 == len(ids)
        found.append(Token(index, text if whole else "", learnt and place > 0, index in control))
        begin = place + 1 if whole else begin
    return found


def runs(found: Sequence[Token]) -> list[tuple[str, str]]:
    """(text, kind) of neighbours of one kind together."""
    joined: list[tuple[str, str]] = []
    for token in found:
        if joined and joined[-1][1] == token.kind:
            joined[-1] = joined[-1][0] + token.text, token.kind
        else:
            joined.append((token.text, token.kind))
    return joined


def page(shown: Sequence[tuple[Sample, Sequence[Token]]], title: str) -> str:
    """One HTML page with nothing outside it: every token in a box of its own, its id below the pointer."""
    samples = [
        {
            "where": sample.where,
            "tokens": found,
            "facts": _("{count} tokens, {learnt} learnt").format(
                count=len(found), learnt=sum(token.learnt for token in found)
            ),
        }
        for sample, found in shown
    ]
    legend = {
        "learnt": _("learnt: what the model is taught to say"),
        "learnt-markup": _("learnt turn token: where it stops"),
        "markup": _("turn tokens of the template"),
        "text": _("read, not learnt"),
    }
    return str(_template().render(title=title, samples=samples, legend=legend))


@cache
def _template() -> Any:
    return Environment(autoescape=True, trim_blocks=True).from_string(PAGE)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>
:root { --ink: #1c2126; --muted: #5f6873; --paper: #fff; --line: #d5dae0; --learnt: #d6f0df; --end: #8fd3a8;
  --markup: #e9dcf5; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --muted: #9aa4ae; --paper: #15181b; --line: #353c43;
  --learnt: #1d4a2f; --end: #2f7d4d; --markup: #46305c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere }
p { color: var(--muted); margin: .2rem 0 .6rem }
.sample { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem }
.sample span, .legend span { border-radius: 3px; box-shadow: inset 0 0 0 1px var(--line) }
.learnt { background: var(--learnt) } .learnt-markup { background: var(--end); font-weight: 600 }
.markup { background: var(--markup) }
.legend span { padding: .1rem .5rem; margin-right: .6rem; display: inline-block }
details { margin-top: .4rem; color: var(--muted) } .ids { font: 12px/1.6 ui-monospace, monospace }
</style></head><body><h1>{{ title }}</h1>
<p class="legend">{% for kind, text in legend.items() %}<span class="{{ kind }}">{{ text }}</span>{% endfor %}</p>
{% for sample in samples %}
<h2>{{ sample.where }}</h2><p>{{ sample.facts }}</p>
<div class="sample">{% for token in sample.tokens %}<span class="{{ token.kind }}" title="{{ token.id }}">
{{- token.text }}</span>{% endfor %}</div>
<details><summary>ids</summary><div class="ids">{% for token in sample.tokens %}<span class="{{ token.kind }}">
{{- token.id }}</span> {% endfor %}</div></details>
{% endfor %}
</body></html>
"""
