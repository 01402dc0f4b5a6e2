"""`afina`: finds the verb, and turns whatever ends it into one clear message and a documented exit status."""

import gc
import io
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from afina import __version__
from afina.cli import chat, compress, data, doctor, evaluate, export, init, plan, push, rate, run, serve, train
from afina.cli.options import Debug, Json
from afina.cli.usage import refusal, translate
from afina.console import console
from afina.errors import AfinaError, Interrupted, reason_of
from afina.language import _

app = typer.Typer(
    help=_("From a file of examples to a language model that answers, with proof at every step."),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", help=_("Train, evaluate and export as a recipe says, skipping what is done."))(run.command)
app.command("init", help=_("Lay out a project folder with a commented recipe."))(init.command)
app.command("doctor", help=_("Say what this machine is, and what it can train."))(doctor.command)
app.command("plan", help=_("Say whether a recipe fits the GPU, how long it takes, and what else it could be."))(
    plan.command
)
app.command("train", help=_("Fine-tune as a recipe says; leaves a run folder."))(train.command)
app.command("eval", help=_("Put a recipe's tasks to base, tuned, exported files, and anyone else."))(evaluate.command)
app.command("rate", help=_("Rate the answers of a run by hand, blind: 1 to 5, or which of two is better."))(
    rate.command
)
app.command("export", help=_("Make files that llama.cpp, Ollama, LM Studio or transformers run."))(export.command)
app.command("chat", help=_("Talk to a run, a model folder or a GGUF file."))(chat.command)
app.command("serve", help=_("Serve a run, a model or a GGUF file by OpenAI's API, several adapters on one base."))(
    serve.command
)
app.command("push", help=_("Upload a run's adapter or exported files to a model hub."))(push.command)
app.add_typer(compress.app, name="compress")
app.add_typer(data.app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        console.line(f"afina {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help=_("Print the version."))
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The options every verb takes too."""


def main() -> NoReturn:
    """Run the command line and exit with the status that errors.py documents."""
    console.json, console.debug = "--json" in sys.argv, "--debug" in sys.argv  # also when the rest cannot be understood
    if not console.debug:
        # Libraries warn each other's developers there; what users need comes from us.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    _prepare_process()
    try:
        status = _status(sys.argv[1:])
    except (KeyboardInterrupt, Interrupted):  # a second one, in the instant before the first is told
        status = Interrupted("").exit_status
    _leave(status)


def _status(arguments: list[str]) -> int:
    """Of the verb, once what ended it is told."""
    try:
        _invoke(arguments)
    except AfinaError as error:
        return _show(error)
    except KeyboardInterrupt as stop:
        return _show(Interrupted(_("Stopped by Ctrl-C; nothing half-written was left.")), stop)
    except typer.Exit as finished:
        return finished.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # noqa: BLE001 - the one place where nothing may pass unexplained
        return _unexpected(error)
    return 0


def _prepare_process() -> None:
    """Signals that end us become errors; threads sleep while they wait; no character ends the program."""
    _handle(_on_signal, "SIGTERM", "SIGHUP")
    # Waiting threads that spin take the processor from those that work: on a busy machine training was 7 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # How cuBLAS, asked for the same bits each time, shares its memory; read when the first product is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Memory that waits for the GPU is pinned by eight threads: 33 GB in 7 s instead of most of a minute.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave(status: int) -> NoReturn:
    """Exit without looking for cycles in all that was imported, which with torch took two seconds of processor.

    Where an error or a signal ends us, a thread that still computes, writes or imports is not waited for: it would meet
    an interpreter that is half taken down, and in the middle of C++ that ends the process with another status.
    """
    gc.freeze()
    if status and threading.active_count() > 1:
        _end(status)
    sys.exit(status)


def _end(status: int) -> NoReturn:
    """What is written is written out; nothing else is taken down, neither by us nor by Python."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _invoke(arguments: list[str]) -> None:
    """The verb alone, without typer's own handling of what ends it: that turns Ctrl-C into a silent exit."""
    command = typer.main.get_command(app)
    translate(command)
    with command.make_context("afina", arguments) as context:
        command.invoke(context)


def _end_at_signals() -> None:
    """All is saved: a further signal ends the process on the spot, and no traceback tells of it."""
    _handle(signal.SIG_DFL, "SIGINT", "SIGTERM", "SIGHUP")


def _show(error: AfinaError, cause: BaseException | None = None) -> int:
    if isinstance(error, Interrupted):
        _end_at_signals()
    if console.debug:
        import traceback

        traceback.print_exception(cause or error)
    console.error(error)
    return error.exit_status


def _unexpected(error: Exception) -> int:
    """Usage errors of the command line, refusals of the operating system; the rest is our own mistake."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        if type(error).__name__ != "NoArgsIsHelpError":
            return _show(refusal(error))
        error.show()  # type: ignore[attr-defined]  # the help
        return int(error.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        told = _("{path}: {reason}.").format(path=error.filename, reason=reason_of(error))
        return _show(AfinaError(told), error)
    return _show(
        AfinaError(
            _("This is a mistake in afina: {kind}: {reason}").format(kind=type(error).__name__, reason=error),
            hint=_("Run the same command with --debug and report what it prints."),
        ),
        error,
    )


def _handle(handler: Any, *names: str) -> None:
    """Of the signals that there are here, and that are not ignored, as nohup has it."""
    for name in names:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(
        _("Stopped by {signal}; nothing half-written was left.").format(signal=signal.Signals(number).name),
        signal_number=number,
    )
