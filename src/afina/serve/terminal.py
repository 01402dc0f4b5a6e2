"""A session on a terminal: questions in, answers streamed, a few commands. From a pipe: a question a line.

Knows nothing of models; a line that begins with `/` and a word is a command, everything else is said to the speakers.
"""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from afina.console import Console
from afina.errors import AfinaError, DataError, Interrupted, RecipeError
from afina.language import _
from afina.recipe.explain import nearest
from afina.recipe.schema import Chat
from afina.serve.personas import Cast
from afina.serve.session import Reply, Session

PROMPT = "> "
COMMAND = re.compile(r"/([\w-]+)(?:\s+(.*))?", re.DOTALL)
"""A command is one word: `/etc/passwd` at the start of a question is none."""
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters: a model's answer must not drive the terminal."""


def chat(session: Session, console: Console) -> None:
    """Talk until /exit or the end of input. Raises AfinaError, at a terminal only for what ends the talk."""
    _Talk(session, console).run()


def answer_once(session: Session, prompt: str, console: Console) -> None:
    """Put one question and print the answers. Raises AfinaError."""
    _Talk(session, console, live=False).say(prompt)


class _Talk:
    """One talk: what is typed becomes commands and questions, what is answered becomes lines."""

    def __init__(self, session: Session, console: Console, *, live: bool | None = None) -> None:
        self._session = session
        self._console = console
        self._live = sys.stdin.isatty() and not console.json if live is None else live
        self._told = False
        self._last = "\n"
        self._commands: dict[str, Callable[[str], bool]] = {
            "reset": self._reset,
            "system": self._system,
            "temperature": lambda text: self._number("temperature", text),
            "top-p": lambda text: self._number("top-p", text),
            "effort": self._effort,
            "persona": self._persona,
            "help": self._help,
            "exit": lambda text: True,
            "quit": lambda text: True,
        }

    def run(self) -> None:
        """Read and answer until the end."""
        if self._live:
            with suppress(ImportError):
                import readline  # noqa: F401 - input() then edits lines and remembers them
            self._console.heading(" · ".join(speaker.name for speaker in self._session.speakers))
            self._console.line(_("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."), "dim")
        over = False
        while not over:
            try:
                line = self._read()
                over = line is None or self._take(line)
            except AfinaError as error:
                if not self._live:
                    raise
                self._console.error(error)

    def say(self, text: str) -> None:
        """Put a question to every speaker and show the answers."""
        self._session.ask(text, self._show, lambda reply: self._report(text, reply))

    def _read(self) -> str | None:
        """The next line that is not empty; None at the end of input."""
        while True:
            try:
                line = self._console.ask(f"\n{PROMPT}" if self._live and sys.stdout.isatty() else "").strip()
                line.encode()
            except EOFError:
                if self._live:
                    self._console.line()  # the shell's prompt then starts on a line of its own
                return None
            except KeyboardInterrupt:
                if not self._live:
                    raise Interrupted(_("The chat was stopped.")) from None
                self._console.line()
                self._console.line(_("Ctrl-D or /exit ends the chat."), "dim")
                continue
            except UnicodeError as error:
                raise DataError(_("The input is not UTF-8 text."), hint=_("Save it as UTF-8 and try again.")) from error
            if line:
                return line

    def _take(self, line: str) -> bool:
        """Do what a line asks for; true when the talk is over."""
        match = COMMAND.fullmatch(line)
        if match is None:
            self.say(line)
            return False
        name, text = match[1].lower(), (match[2] or "").strip()
        if name not in self._commands:
            near = nearest(name, [known.replace("-", "_") for known in self._commands]).replace("_", "-")
            raise RecipeError(
                _("There is no command /{name}.").format(name=name),
                hint=_("Did you mean {nearest}?").format(nearest=f"/{near}")
                if near
                else _("/help lists the commands."),
            )
        return self._commands[name](text)

    def _show(self, name: str, piece: str) -> None:
        """Print a piece of an answer; the empty one begins it."""
        if piece:
            self._print(UNSHOWN.sub("", piece) if sys.stdout.isatty() else piece)
        elif len(self._session.speakers) > 1 or (self._cast and self._live):
            self._console.heading(name)

    def _report(self, question: str, reply: Reply) -> None:
        """End an answer, and say what is to be said of it."""
        if self._last != "\n":
            self._print("\n")
        facts = {"stopped": reply.stopped, "forgotten": reply.forgotten}
        self._console.event("answer", speaker=reply.name, question=question, text=reply.text, **facts)
        if reply.forgotten and not self._told:
            self._told = True
            self._console.warn(_("The conversation outgrew the model's context: its oldest turns are forgotten."))
        if reply.stopped and not self._live:
            raise Interrupted(_("The answer was stopped."))

    def _print(self, text: str) -> None:
        self._console.stream(text)
        self._last = text[-1:] or self._last

    def _reset(self, text: str) -> bool:
        self._session.reset()
        self._told = False
        self._console.line(_("The conversation begins anew."), "dim")
        return False

    def _system(self, text: str) -> bool:
        self._session.set_system(text)
        self._told = False
        said = _("The system message is set; the conversation begins anew.")
        self._console.line(said if text else _("No system message; the conversation begins anew."), "dim")
        return False

    @property
    def _cast(self) -> Cast | None:
        """The personalities, where there are any."""
        speaker = self._session.speakers[0]
        return speaker if isinstance(speaker, Cast) else None

    def _persona(self, text: str) -> bool:
        """Say who is there, let another one answer, load one (NAME=FOLDER) or drop one (-NAME)."""
        cast = self._cast
        if cast is None:
            raise RecipeError(
                _("This chat has one personality."), hint=_("Start it with --adapter NAME=FOLDER to have several.")
            )
        name, equals, place = text.partition("=")
        if equals:
            cast.add(name.strip(), Path(place.strip()).expanduser())
            cast.choose(name.strip())
        elif text.startswith("-"):
            cast.drop(text[1:].strip())
        elif text:
            cast.choose(text)
        self._session.go_on_with(cast.settings.get(cast.chosen, Chat()))
        there = ", ".join(f"[{name}]" if name == cast.chosen else name for name in cast.names)
        self._console.line(_("{name} answers; there are {names}.").format(name=cast.chosen, names=there), "dim")
        return False

    def _effort(self, text: str) -> bool:
        """Set how long a model that reasons thinks."""
        try:
            self._session.change(effort=text.lower() or None)
        except ValueError as error:
            raise RecipeError(
                _("/{name} does not take “{text}”.").format(name="effort", text=text),
                hint=_("/effort takes low, medium or high; nothing leaves it to the model."),
            ) from error
        self._console.line(
            _("{name} is {value}.").format(name="effort", value=self._session.settings.effort or "-"), "dim"
        )
        return False

    def _number(self, name: str, text: str) -> bool:
        """Change a setting that is a number."""
        key = name.replace("-", "_")
        try:
            self._session.change(**{key: float(text.replace(",", "."))})
        except ValueError as error:
            raise RecipeError(
                _("/{name} does not take “{text}”.").format(name=name, text=text),
                hint=_("/temperature takes a number from 0, /top-p one above 0 and up to 1."),
            ) from error
        self._console.line(
            _("{name} is {value:g}.").format(name=name, value=getattr(self._session.settings, key)), "dim"
        )
        return False

    def _help(self, text: str) -> bool:
        settings = self._session.settings
        lines = {
            "/reset": _("forget the conversation and begin anew"),
            "/system TEXT": _("set the system message, or have none, and begin anew"),
            "/temperature X": _("0 takes the likeliest token; now {value:g}").format(value=settings.temperature),
            "/top-p X": _("sample from the likeliest tokens of this share; now {value:g}").format(value=settings.top_p),
            "/effort X": _("low, medium or high: how long a model that reasons thinks"),
            "/persona NAME": _("let another one answer; NAME=FOLDER loads one, -NAME drops one"),
            "/exit": _("end; Ctrl-D does so too"),
        }
        if self._cast is None:
            del lines["/persona NAME"]
        for command, meaning in lines.items():
            self._console.line(f"{command:<16}{meaning}")
        return False
