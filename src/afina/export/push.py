"""A run's files to a model hub, when asked to and never otherwise. A door to huggingface_hub.

What goes is named one by one: adapter or files of the export, with their card and certificate. Data, recipes and logs
stay. The hub's own login says who is asking.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from afina.artifact import open_artifact
from afina.errors import AfinaError, OutputError, RecipeError
from afina.language import _

What = Literal["adapter", "merged", "gguf"]
PROOFS = ("certificate.json", "certificate.html", "Modelfile")
"""What goes beside the files of an export."""


def chosen_files(run: Path, what: Sequence[What]) -> list[tuple[str, Path]]:
    """Place in the repository, and file, of everything that would go. Raises RecipeError where there is nothing.

    The run's manifest, and the export's, must agree with what lies there.
    """
    open_artifact(run, "run").verify()
    found = {"README.md": run / "README.md"}
    export = run / "export"
    if "adapter" in what:
        found |= _below(run / "adapter")
    if set(what) & {"merged", "gguf"}:
        if not export.is_dir():
            raise RecipeError(
                _("{run} is not exported yet.").format(run=run),
                hint=_("Export it first: afina export {run}").format(run=run),
            )
        open_artifact(export, "export").verify()
        found |= {name: export / name for name in PROOFS if (export / name).is_file()}
    if "merged" in what:
        found |= _below(export / "merged")
    if "gguf" in what:
        found |= {path.name: path for path in sorted(export.glob("*.gguf"))}
    missing = {
        "adapter": not (run / "adapter").is_dir(),
        "merged": not (export / "merged").is_dir(),
        "gguf": not any(export.glob("*.gguf")),
    }
    for kind in what:
        if missing[kind]:
            raise RecipeError(
                _("{run} holds nothing of the kind {kind}.").format(run=run, kind=kind),
                hint=_("Export it first: afina export {run}").format(run=run),
            )
    return sorted((place, path) for place, path in found.items() if path.is_file())


def _below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def push_files(
    files: Sequence[tuple[str, Path]], repository: str, *, private: bool = True, endpoint: str | None = None
) -> str:
    """Put `files` into the model repository OWNER/NAME in one commit, making it where there is none; returns its
    address. `endpoint` is another hub than the usual one. Raises OutputError when the hub refuses or is not there."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    hub: Any = HfApi(endpoint=endpoint)
    try:
        disable_progress_bars()
        hub.create_repo(repository, private=private, exist_ok=True)
        additions = [CommitOperationAdd(place, path) for place, path in files]
        done = hub.create_commit(repository, additions, commit_message="Files of a training run, by Afina")
    except AfinaError:  # a signal
        raise
    except Exception as error:  # of the hub, of its client, of the network: a family of exceptions each
        raise OutputError(
            _("The hub did not take the files: {reason}").format(reason=str(error).strip().split("\n")[0]),
            hint=_("See that you are logged in (hf auth login), may write to {name}, and reach the hub.").format(
                name=repository
            ),
        ) from error
    return str(done.commit_url)
