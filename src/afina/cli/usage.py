"""How a command line is written, and what is wrong with one: typer's help and refusals, in the language of messages.

typer has most of these words in English only, and its classes of refusals in a private package: they are known here by
name. What it gets from gettext stands in phrases.py.
"""

import re
from functools import partial
from typing import Any

from afina.errors import RecipeError
from afina.language import _


def translate(command: Any) -> None:
    """The usage and the help option of a command, and of the verbs below it."""
    command.options_metavar = _("[OPTIONS]")
    command.get_usage = partial(_usage, command)
    command.get_help_option = partial(_help_option, command.get_help_option)
    for verb in getattr(command, "commands", {}).values():
        command.subcommand_metavar = _("VERB [ARGUMENTS]...")
        translate(verb)


def _usage(command: Any, context: Any) -> str:
    return _("Usage: {usage}").format(usage=" ".join([context.command_path, *command.collect_usage_pieces(context)]))


def _help_option(made: Any, context: Any) -> Any:
    option = made(context)
    if option is not None:
        option.help = _("Show this help.")
    return option


def refusal(error: Any) -> RecipeError:
    """What typer refused, as an error of ours: the sentence, and how the verb is used."""
    context = getattr(error, "ctx", None)
    if context is None:
        return RecipeError(_sentence(error), hint=_("afina --help lists the verbs and their options."))
    hint = _("{usage}; {command} --help says more.").format(usage=context.get_usage(), command=context.command_path)
    return RecipeError(_sentence(error), hint=hint)


def _sentence(error: Any) -> str:
    """By the kind of refusal; what is not known of it stays as typer says it."""
    message = str(error.message)
    match type(error).__name__:
        case "MissingParameter":
            return _("Missing argument {name}.").format(name=error.param.get_error_hint())
        case "NoSuchOption":
            said = _("No such option: {name}.").format(name=error.option_name)
            near = " · ".join(sorted(error.possibilities or ()))
            return f"{said} {_('Did you mean {nearest}?').format(nearest=near)}" if near else said
        case "BadOptionUsage":
            if wanted := re.search(r"requires (\d+|an)\b", message):
                count = 1 if wanted[1] == "an" else int(wanted[1])
                return _("Option {name} takes {count} value(s) after it.").format(name=error.option_name, count=count)
            return _("Option {name} takes no value.").format(name=error.option_name)
        case "BadParameter":
            name = error.param_hint or error.param.get_error_hint()
            return _("Invalid value for {name}: {reason}").format(name=name, reason=_reason(error))
        case _ if extra := re.search(r"unexpected extra argument\S* \((.*)\)", message):
            return _("Nothing is expected after the arguments, but there is: {extra}").format(extra=extra[1])
    return message


def _reason(error: Any) -> str:
    """Why a value was refused: what pydantic, which typer asks, found; else what is said already, as by our verbs."""
    if chosen := re.search(r"('.*') is not one of ('.*')\.$", error.message):
        return _("{name} is not one of {names}.").format(name=chosen[1], names=chosen[2])
    found: dict[str, Any] = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else {"type": ""}
    sentence = {
        "int_parsing": _("{value} is no whole number."),
        "float_parsing": _("{value} is no number."),
        "greater_than_equal": _("{value} is less than {ge:g}."),
        "less_than_equal": _("{value} is more than {le:g}."),
    }.get(found["type"])
    return sentence.format(value=found["input"], **found.get("ctx", {})) if sentence else str(error.message)
