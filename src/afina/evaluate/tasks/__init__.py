"""Tasks: what is asked and how answers are marked, one file a kind."""
