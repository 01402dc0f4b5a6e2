"""Where a model's files lie on this machine: the folder it is named by, or the hub's own cache of its name.

A door to huggingface_hub, for what is read of a model beside transformers: its figures and tokenizer before training,
its weights when they are exported.
"""

from pathlib import Path

WORDS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""Everything that is not weights, as hubs name it."""


def words_of(source: str, revision: str | None) -> Path | None:
    """A folder with figures and tokenizer: `source` itself, or what the hub has of that name, fetched where it is not
    here yet. None for a GGUF file, and where there is no such name or no network: loading it will say why."""
    return _folder(source, revision, fetched=True)


def weights_of(source: str, revision: str | None) -> Path | None:
    """A folder with the weights too, of a model that was loaded before; None where there is none, as for a GGUF
    file."""
    return _folder(source, revision, fetched=False)


def _folder(source: str, revision: str | None, *, fetched: bool) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file() or source.endswith(".gguf"):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = WORDS if fetched else None
    try:
        found = snapshot_download(
            source,
            revision=revision or "main",
            allow_patterns=list(wanted) if wanted else None,
            local_files_only=not fetched,
        )
    except (HfHubHTTPError, OSError, ValueError):
        return None
    return Path(str(found))
