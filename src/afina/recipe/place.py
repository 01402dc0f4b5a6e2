"""Where the things a recipe names lie: what ships with the package, paths relative to the recipe, hub names."""

from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "bundled"


def model_source(name: str, folder: Path) -> str:
    """A path or hub name that transformers understands: a bundled model, a folder beside the recipe, else as it is."""
    if name == "afina/tiny":
        return str(BUNDLED / "tiny")
    for start in (folder, Path()):
        if (path := start / Path(name).expanduser()).exists():
            return str(path.resolve())
    return name
