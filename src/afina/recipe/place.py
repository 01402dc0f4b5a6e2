"""Where the things a recipe names lie: what ships with the package, paths relative to the recipe, hub names."""

from pathlib import Path

from afina.hub import look_for_hub

BUNDLED = Path(__file__).parents[1] / "bundled"


def schema_file(name: str, folder: Path) -> Path:
    """A JSON Schema: beside the recipe, or of a bundled set (afina/NAME/schema.json)."""
    if name.startswith("afina/") and not (folder / name).exists():
        return BUNDLED / "data" / name.removeprefix("afina/")
    return folder / name


def model_source(name: str, folder: Path) -> str:
    """A path or hub name that transformers understands: a bundled model, a folder beside the recipe, else as it is."""
    if name == "afina/tiny":
        return str(BUNDLED / "tiny")
    for start in (folder, Path()):
        if (path := start / Path(name).expanduser()).exists():
            return str(path.resolve())
    look_for_hub()
    return name
