"""`afina data ...`: what is asked of a data set before anything is trained on it. One file a verb."""

import typer

from afina.cli.data import check, show, split, stats, translate
from afina.language import _

app = typer.Typer(
    help=_("Look at a data set, check it and split it, before anything is trained on it."),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check", help=_("Look at every row and name what is wrong: class, file, line, reason, advice."))(
    check.command
)
app.command("stats", help=_("Tokens, turns, what is learnt and what would be cut; with advice for the recipe."))(
    stats.command
)
app.command("show", help=_("Samples as the model sees them: turn tokens, and in colour what is learnt."))(show.command)
app.command("split", help=_("Deal the rows out to files: training, validation, test."))(split.command)
app.command("translate", help=_("Conversations in another language; code and formulas stay."))(translate.command)
