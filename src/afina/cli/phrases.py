"""What typer says of its own: it asks gettext, and finds it translated in our catalogue (see language.lend)."""

from afina.language import _


def phrases() -> list[str]:
    """In the language of messages. Only here so that the catalogue has them."""
    return [
        _("Arguments"),
        _("Commands"),
        _("Missing command."),
        _("No such command {name!r}."),
        _("Options"),
        _("[default: {}]"),
        _("[required]"),
    ]
