"""Where the files of a source lie: on this machine, among the bundled sets, or on the hub. Opens none of them."""

from glob import has_magic
from pathlib import Path

from afina.data.hub import HUB, hub_files
from afina.data.lines import ending_of
from afina.errors import DataError
from afina.language import _
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Data

BUNDLED_SETS = BUNDLED / "data"
IN_FOLDERS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""What is read of a folder that is named; texts only where there is nothing else, for they are often notes."""


def sources(data: Data) -> list[str]:
    """Every source that a recipe names, for training and then for validation."""
    given = [data.train, *([] if isinstance(data.validation, float | int) else [data.validation])]
    return [one for some in given for one in ([some] if isinstance(some, str) else some)]


def find(source: str, folder: Path) -> list[Path]:
    """The files a source names: one file, a folder, a pattern, a bundled set (afina/NAME/SPLIT), or one of the hub."""
    if source.startswith(HUB):
        return hub_files(source.removeprefix(HUB))
    if source.startswith("afina/") and not (folder / source).exists():
        return [_bundled(source)]
    for start in (folder, Path()):
        try:
            if found := _files_at(start, source):
                return found
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # what pathlib raises for odd names
            raise DataError(
                _("The data source {source} cannot be looked up: {reason}.").format(source=source, reason=error),
                hint=_("Name a file, a folder, or a pattern such as data/*.jsonl."),
            ) from error
    raise DataError(
        _("There is no data file {path}.").format(path=source),
        hint=_("Paths start at the recipe's folder ({folder}), then at the current one.").format(folder=folder),
    )


def _bundled(source: str) -> Path:
    names = {f"afina/{path.parent.name}/{path.stem}": path for path in BUNDLED_SETS.glob("*/*.jsonl")}
    if source not in names:
        raise DataError(
            _("There is no bundled data set {name}.").format(name=source),
            hint=_("There are: {names}.").format(names=", ".join(sorted(names))),
        )
    return names[source]


def _files_at(start: Path, source: str) -> list[Path]:
    path = (start / Path(source).expanduser()).resolve()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if has_magic(source):
        pattern = str(path.relative_to(path.anchor))
        return sorted({file.resolve() for file in Path(path.anchor).glob(pattern) if file.is_file()})
    return []


def _files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    found = [file for file in files if ending_of(file) in IN_FOLDERS]
    found = found or [file for file in files if ending_of(file) == ".txt"]
    if not found:
        raise DataError(
            _("The folder {path} holds no data file ({endings}).").format(
                path=folder, endings=", ".join((*IN_FOLDERS, ".txt"))
            ),
            hint=_("Name the folder that holds them, or a pattern such as data/*.txt."),
        )
    return found
