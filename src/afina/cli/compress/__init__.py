"""`afina compress ...`: models made smaller in the same format. One file a verb."""

import typer

from afina.cli.compress import prune
from afina.language import _

app = typer.Typer(
    help=_("Make a model smaller in the same format, and see what it costs."),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prune", help=_("Take weights, layers or MLP channels out of a run or a model, and measure the loss."))(
    prune.command
)
