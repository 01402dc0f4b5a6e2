"""SMALLER, SAME FORMAT: a model pruned, and what that cost."""
