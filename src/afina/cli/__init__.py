"""The command line: one file a verb, each a thin door to `pipeline`."""

from afina.language import lend

lend()  # before typer is imported, which asks for some of its words right then
