"""The one door to data sets of the Hugging Face hub: the files of one by its name, fetched once and kept by the hub's
own cache. No code of a data set is ever run: only files of rows are taken.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Protocol

from afina.data.lines import ending_of
from afina.errors import DataError
from afina.hub import look_for_hub
from afina.language import _

HUB = "hub:"
"""What a source begins with: hub:OWNER/NAME[@REVISION][/WHICH], WHICH being how the paths of the wanted files begin."""
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(.*))?")
ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")
"""The best first: where a set has files of several kinds, they are mostly the same rows."""
NOT_ROWS = ("dataset_infos.json", "dataset_dict.json", "state.json", "dataset_info.json")


class Hub(Protocol):
    """What is asked of the hub."""

    def files(self, name: str, revision: str | None) -> list[str]:
        """Paths of all files of a data set."""

    def fetch(self, name: str, path: str, revision: str | None) -> str:
        """Where a copy of a file lies on this machine."""


class RealHub:
    """The hub itself, or the copies of it on this machine where it cannot be reached."""

    def files(self, name: str, revision: str | None) -> list[str]:
        """Paths of all files of a data set."""
        from huggingface_hub import HfApi

        return [str(path) for path in HfApi().list_repo_files(name, repo_type="dataset", revision=revision)]

    def fetch(self, name: str, path: str, revision: str | None) -> str:
        """Where a copy of a file lies on this machine."""
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(name, path, repo_type="dataset", revision=revision))


def hub_files(source: str, hub: Hub | None = None) -> list[Path]:
    """Local copies of the files that OWNER/NAME[@REVISION][/WHICH] means. Raises DataError."""
    match = _NAME.fullmatch(source)
    if match is None:
        raise DataError(
            _("{source} is no data set of the hub.").format(source=repr(HUB + source)),
            hint=_("Write hub:OWNER/NAME, hub:OWNER/NAME/WHICH or hub:OWNER/NAME@REVISION/WHICH."),
        )
    name, revision, which = match.group(1), match.group(2), match.group(3) or ""
    from huggingface_hub.errors import HfHubHTTPError

    if hub is None:
        look_for_hub()
    hub = hub or RealHub()
    try:
        chosen = _chosen(hub.files(name, revision), which, name)
        return [Path(hub.fetch(name, path, revision)).absolute() for path in chosen]
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            _("The data set {name} cannot be fetched from the hub: {reason}").format(
                name=name, reason=str(error).strip().split("\n")[0]
            ),
            hint=_("See that the name is right and the network is there, or download its files and name their folder."),
        ) from error


def _chosen(paths: list[str], which: str, name: str) -> list[str]:
    """The files whose paths begin with `which`, of the best kind there is; of one split alone."""
    rows = [path for path in sorted(paths) if PurePosixPath(path).name not in NOT_ROWS and not path.startswith(".")]
    found = [path for path in rows if path.startswith(which)]
    kind = next((kind for kind in ENDINGS if any(ending_of(Path(path)) == kind for path in found)), None)
    found = [path for path in found if ending_of(Path(path)) == kind]
    parts = sorted({_part(path) for path in (found or rows) if ending_of(Path(path)) in ENDINGS})
    if found and (len(parts) == 1 or which):
        return found
    raise DataError(
        _("The data set {name} has the parts {parts}.").format(name=name, parts=", ".join(parts[:40]) or "-"),
        hint=_("Name one: hub:{name}/{part}").format(name=name, part=parts[0] if parts else "train"),
    )


def _part(path: str) -> str:
    """A file's path up to the number of its shard: main/train of main/train-00000-of-00001.parquet."""
    bare = path[: -len("".join(PurePosixPath(path).suffixes)) or None]
    return re.sub(r"-\d{3,}(-of-\d+)?(-[0-9a-f]{8,})?$", "", bare)
