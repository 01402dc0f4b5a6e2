"""One page about a run, the same in Markdown, and its numbers as JSON."""

from afina.evaluate.report.page import TEMPLATE, draw

__all__ = ["TEMPLATE", "draw"]
