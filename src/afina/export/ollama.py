"""A Modelfile: the trained chat template in Go's template language, with stops, system message and sampling.

The template is never translated. It is rendered on probes, and what it writes around the messages becomes the text of
a Go template (`Turns`). That this is all it does is then checked: both must render the same on conversations of every
kind. A template that does more, such as writing today's date, is refused. Knows nothing of weights.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import which

from afina.console import Console
from afina.data.tokenizer import Tokenizer
from afina.errors import ModelError
from afina.language import _
from afina.recipe.schema import Chat

Row = dict[str, str]
TIMEOUT_S = 1800.0
"""Seconds after which Ollama counts as stuck; it copies the file, which may be large."""
SYSTEM, USER, ANSWER = "\ue0f4s\ue0f5", "\ue0f4u\ue0f5", "\ue0f4a\ue0f5"
"""Contents of the probes: private-use characters, which no template writes."""


@dataclass(frozen=True)
class Turns:
    """What a template writes: around each role's contents, before a conversation without a system message
    (`unasked`), and where the model takes over (`opening`).

    `system_in` says where the system message goes: a turn of its "own", into the "first" or "last" user's turn before
    the contents, or "nowhere", where the template knows none.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    unasked: str
    opening: str
    system_in: str = "own"

    def render(self, rows: Sequence[Row]) -> str:
        """The same as the Go template does, here."""
        given = rows[0]["content"] if rows[0]["role"] == "system" else None
        users = [place for place, row in enumerate(rows) if row["role"] == "user"]
        text = "" if given is not None and self.system_in == "own" else self.unasked
        for place, row in enumerate(rows):
            before, after = getattr(self, row["role"])
            if row["role"] == "system" and self.system_in != "own":
                continue
            if row["role"] == "user" and given is not None and place == self._host(users):
                before += self.system[0] + given + self.system[1]
            text += before + row["content"] + after
        return text + (self.opening if rows[-1]["role"] != "assistant" else "")

    def _host(self, users: list[int]) -> int | None:
        return {"first": users[0], "last": users[-1]}.get(self.system_in)

    def go(self) -> str:
        """As Go's text/template, with the fields that Ollama fills: .Messages and .System."""
        (s0, s1), (u0, u1), (a0, a1) = (tuple(map(_escaped, pair)) for pair in (self.system, self.user, self.assistant))
        unasked, inside = _escaped(self.unasked), ""
        if self.system_in == "own":
            begin = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{unasked}{{{{ end }}}}' if unasked else ""
            own = f'{{{{ if eq .Role "system" }}}}{s0}{{{{ .Content }}}}{s1}{{{{ else if eq .Role "user" }}}}'
        else:
            begin = f"{{{{ if eq $i 0 }}}}{unasked}{{{{ end }}}}" if unasked else ""
            own = '{{ if eq .Role "user" }}'
            if self.system_in != "nowhere":
                host = "eq $i $first" if self.system_in == "first" else "eq $i $final"
                inside = f"{{{{ if and $.System ({host}) }}}}{s0}{{{{ $.System }}}}{s1}{{{{ end }}}}"
        scan = (
            '{{ $first := -1 }}{{ $final := -1 }}{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
            "{{ if lt $first 0 }}{{ $first = $i }}{{ end }}{{ $final = $i }}{{ end }}{{ end }}"
        )
        return "".join(
            [
                scan if inside else "",
                '{{ $last := "" }}{{ range $i, $m := .Messages }}{{ $last = .Role }}',
                begin,
                own,
                f"{u0}{inside}{{{{ .Content }}}}{u1}",
                f'{{{{ else if eq .Role "assistant" }}}}{a0}{{{{ .Content }}}}{a1}{{{{ end }}}}{{{{ end }}}}',
                f'{{{{ if ne $last "assistant" }}}}{_escaped(self.opening)}{{{{ end }}}}',
            ]
        )


def _escaped(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def modelfile(
    tokenizer: Tokenizer, gguf: str, chat: Chat, *, system: str | None, context: int
) -> tuple[str, list[str]]:
    """The Modelfile for the GGUF file named `gguf`, which lies beside it, and notes for the user.

    Raises ModelError for a chat template that cannot be said in Go's language.
    """
    turns, notes = read_turns(tokenizer)
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(_without_bos(turns, tokenizer).go())}"]
    if system and turns.system_in == "nowhere":
        notes.append(_("The template knows no system message; the one of the recipe is left out."))
    elif system:
        lines.append(f"SYSTEM {_quoted(system)}")
    lines += [f"PARAMETER stop {_one_line(stop)}" for stop in stops(turns, tokenizer)]
    lines += [
        f"PARAMETER temperature {chat.temperature:g}",
        f"PARAMETER top_p {chat.top_p:g}",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {chat.max_new_tokens}",
    ]
    return "\n".join(lines) + "\n", notes


def stops(turns: Turns, tokenizer: Tokenizer) -> list[str]:
    """Texts at which an answer is over: the ends of turn, and where plain words open the user's turn, these words."""
    found = [str(tokenizer.hf.convert_ids_to_tokens(index)) for index in tokenizer.end_ids]
    opening = turns.user[0].strip()
    if opening and not any(token in opening for token in tokenizer.control_tokens):
        found.append(opening)
    return found


def read_turns(tokenizer: Tokenizer) -> tuple[Turns, list[str]]:
    """What the tokenizer's template writes around messages, proved on `_conversations`, and notes."""
    for turns in _candidates(tokenizer):
        stripped = [strip for strip in (False, True) if _agrees(turns, tokenizer, strip)]
        if not stripped:
            continue
        if stripped[0]:
            note = _("The template takes away spaces around a message, which Ollama does not.")
            return turns, [note]
        return turns, []
    raise ModelError(
        _("This chat template does more than write around the messages, so it cannot be said in Ollama's language."),
        hint=_("Train with afina/chatml (model.chat_template), or export gguf and write the Modelfile yourself."),
    )


def _candidates(tokenizer: Tokenizer) -> Iterator[Turns]:
    """Readings of the template, the simplest first."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    try:
        bare = tokenizer.render([user, answer, user], prompt=True)
        closed = tokenizer.render([user, answer, user])
        once = tokenizer.render([user, answer])
    except ModelError:
        return
    if bare.count(USER) != 2 or bare.count(ANSWER) != 1:
        return
    begin, between, rest = re.split(f"{USER}(.*?){ANSWER}", bare, maxsplit=1, flags=re.DOTALL)
    next_turn, _user, end = rest.partition(USER)
    # Between two turns it does not matter which of them a text belongs to; a template that closes a finished
    # conversation in its own way (Phi-3) leaves no better clue than what both beginnings of a user's turn share.
    opening = bare[len(closed) :] if bare.startswith(closed) else end
    after_user = end.removesuffix(opening) if opening else end
    before_answer = between.removeprefix(after_user)
    after_answer = once.rpartition(ANSWER)[2]
    if not next_turn.startswith(after_answer):
        after_answer = next_turn.removesuffix(_common_end(begin, next_turn))
    before_user = next_turn.removeprefix(after_answer)
    unasked = begin.removesuffix(before_user)
    plain = Turns(("", ""), (before_user, after_user), (before_answer, after_answer), unasked, opening)
    try:
        asked = tokenizer.render([{"role": "system", "content": SYSTEM}, user, answer, user], prompt=True)
    except ModelError:
        yield replace(plain, system_in="nowhere")
        return
    if SYSTEM not in asked or USER not in asked:
        yield replace(plain, system_in="nowhere")
        return
    before, _system, after = asked.partition(SYSTEM)
    middle = after.partition(USER)[0]
    if middle.endswith(before_user):
        yield replace(plain, system=(before, middle.removesuffix(before_user)))
    for where in ("first", "last"):
        head = before[before.rfind(before_user) + len(before_user) :] if before_user else ""
        yield replace(plain, system=(head, middle), system_in=where)


def _common_end(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return a[len(a) - count :]


def _agrees(turns: Turns, tokenizer: Tokenizer, strip: bool) -> bool:
    """Whether the reading renders like the template, on contents without spaces around them or (not `strip`) with."""
    for rows in _conversations(strip):
        try:
            wanted = tokenizer.render([dict(row) for row in rows], prompt=rows[-1]["role"] != "assistant")
        except ModelError:
            if rows[0]["role"] == "system":
                continue  # a template that refuses system messages
            return False
        if turns.render(rows) != wanted:
            return False
    return True


def _conversations(strip: bool) -> Iterator[list[Row]]:
    for system in (None, "Be brief.", "Two\n\nlines"):
        for turns in range(1, 4):
            rows = [] if system is None else [{"role": "system", "content": system}]
            for turn in range(turns):
                rows.append({"role": "user", "content": f"question {turn}?" if strip else f" question {turn}?\n"})
                rows.append({"role": "assistant", "content": f"answer {turn}" if strip else f"\nanswer {turn} "})
            yield rows[:-1]


def _without_bos(turns: Turns, tokenizer: Tokenizer) -> Turns:
    """Ollama puts the beginning of sequence before the text where the GGUF file says so; a second one is too many."""
    if tokenizer.bos_id is None:
        return turns
    bos = str(tokenizer.hf.bos_token)
    system = (turns.system[0].removeprefix(bos), turns.system[1])
    return replace(turns, unasked=turns.unasked.removeprefix(bos), system=system)


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ModelError(_("Three quotation marks in a row cannot be written into a Modelfile."))
    return f'"""{text}"""'


def _one_line(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def create_in_ollama(folder: Path, name: str, console: Console) -> bool:
    """Hand the Modelfile in `folder` to Ollama where it is installed; says what it did, or how to do it by hand.

    The export is whole and proved by then: whatever Ollama says, it stays.
    """
    model = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"
    program = which("ollama")
    by_hand = _("In {folder}: ollama create {name} -f Modelfile").format(folder=folder, name=model)
    if program is None:
        console.line(by_hand)
        return False
    try:
        done = subprocess.run(
            [program, "create", model, "-f", "Modelfile"], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        console.warn(_("Ollama did not take the model: {reason}").format(reason=error))
        console.line(by_hand)
        return False
    if done.returncode:
        last = (done.stderr or done.stdout).strip().split("\n")[-1]
        console.warn(_("Ollama did not take the model: {reason}").format(reason=last))
        console.line(by_hand)
        return False
    console.line(_("Ollama has it: ollama run {name}").format(name=model))
    return True
