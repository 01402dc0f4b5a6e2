"""WILL IT FIT, HOW LONG, WHICH KNOBS: counted from shapes and from the recipe's own data, before anything is loaded."""
