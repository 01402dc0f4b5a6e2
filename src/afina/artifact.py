"""A folder with a manifest: what it is, what it was made from, and a hash of every file in it.

Stages meet on disk through these: a verb reads artifacts and writes one. The manifest (`manifest.json`) answers
"exactly what was trained" (MISSION M36): parents' hashes, recipe as resolved, versions, seeds, hardware. Knows
nothing of models or data.
"""

import hashlib
import json
import mmap
import platform
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from afina import durable
from afina.errors import AfinaError, OutputError
from afina.language import _

MANIFEST = "manifest.json"
FORMAT = 1
MANIFEST_BYTES = 2**26
"""No manifest is read beyond this; a run over a million files would have one of 64 MiB."""
AT_ONCE = 2**24
"""Bytes of a file that are hashed at once."""
RECORDED_PACKAGES = (
    "afina",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "xllamacpp",
)


@dataclass(frozen=True)
class Artifact:
    """A sealed folder. `manifest` is the parsed manifest; `files` maps each relative path to its digest and size."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """What the folder holds: `run`, `model`, `gguf`, ..."""
        return str(self.manifest["kind"])

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest file: names this artifact in its children."""
        return sha256(self.folder / MANIFEST)

    def verify(self) -> None:
        """Compare every file with its recorded hash. Raises OutputError naming each file that differs."""
        wrong = [name for name, entry in self.manifest["files"].items() if not self._holds(name, entry)]
        if wrong:
            raise OutputError(
                _("{folder} is not what its manifest says: {files}.").format(
                    folder=self.folder, files=", ".join(wrong)
                ),
                hint=_("The files were changed or damaged after they were written. Make the artifact again."),
            )

    def _holds(self, name: str, entry: Any) -> bool:
        """Whether the file is there as recorded; a name that leads out of the folder is never followed."""
        file = self.folder / name
        inside = file.resolve().is_relative_to(self.folder.resolve())
        return inside and file.is_file() and isinstance(entry, dict) and sha256(file) == entry.get("sha256")


def seal(
    folder: Path,
    kind: str,
    *,
    parents: Iterable[dict[str, Any]] = (),
    leaving_out: Collection[str] = (),
    **facts: Any,
) -> Artifact:
    """Write the manifest of a finished folder. `facts` are recorded as they are (recipe, seeds, measured figures).

    What lies in `folder` under a name of `leaving_out` is no part of it.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / MANIFEST
        and durable.PARTIAL not in path.name
        and path.relative_to(folder).parts[0] not in leaving_out
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "parents": list(parents),
        "versions": versions(),
        **facts,
        "files": files,
    }
    durable.write_json(folder / MANIFEST, manifest)
    return Artifact(folder, manifest)


def open_artifact(folder: Path, kind: str | None = None) -> Artifact:
    """Read the manifest of `folder`. Raises AfinaError when there is none, or it is of another kind."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            content = file.read(MANIFEST_BYTES + 1)
        if len(content) > MANIFEST_BYTES:
            raise AfinaError(
                _("The file is larger than any real one of its kind."),
                file=folder / MANIFEST,
                hint=_("Name a folder that afina made; an interrupted run has no manifest."),
            )
        manifest = json.loads(content)
    except OSError as error:
        raise AfinaError(
            _("{folder} holds no {manifest}, so it is not a finished artifact.").format(
                folder=folder, manifest=MANIFEST
            ),
            hint=_("Name a folder that afina made; an interrupted run has no manifest."),
        ) from error
    except (ValueError, RecursionError) as error:
        raise AfinaError(
            _("The manifest is not valid JSON: {reason}.").format(reason=error), file=folder / MANIFEST
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise AfinaError(_("The manifest lacks its list of files."), file=folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise AfinaError(
            _("The manifest has the format {found}; this Afina reads format {known}.").format(
                found=manifest.get("format"), known=FORMAT
            ),
            file=folder / MANIFEST,
            hint=_("Read it with the Afina that wrote it, or make the artifact again."),
        )
    if kind is not None and manifest.get("kind") != kind:
        raise AfinaError(
            _("{folder} is of the kind {found}, not {wanted}.").format(
                folder=folder, found=manifest.get("kind"), wanted=kind
            )
        )
    return Artifact(folder, manifest)


def parent(path: Path | str, digest: str, role: str) -> dict[str, str]:
    """One entry of `parents`: what was read, by name and hash."""
    return {"role": role, "name": str(path), "sha256": digest}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in constant memory.

    In few large parts: a thread that hashes waits 5 ms for Python's lock after each while others compute. Nor does it
    hold that lock while the system makes room for such a part, as `bytearray` would.
    """
    digest, room = hashlib.sha256(), memoryview(mmap.mmap(-1, max(2**12, min(path.stat().st_size, AT_ONCE))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and hashes of all files of a folder: names a model folder. Of a sealed one those of its
    manifest, so that what is exported into it leaves it the same."""
    digest = hashlib.sha256()
    paths = (path for path in folder.rglob("*") if path.is_file())
    with suppress(AfinaError):
        paths = (folder / name for name in open_artifact(folder, "model").manifest["files"])
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def source_digest(source: Path) -> str | None:
    """The hash that names a model folder or a file; None where nothing lies there, as for a hub name."""
    if source.is_dir():
        return folder_digest(source)
    return sha256(source) if source.is_file() else None


def versions() -> dict[str, str]:
    """Python's, the platform's and the recorded packages' versions, as installed."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
