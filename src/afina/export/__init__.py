"""The same model in a foreign format: what other programs read, made from what was trained."""
