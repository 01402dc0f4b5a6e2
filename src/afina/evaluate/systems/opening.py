"""From what a user names to who is asked: base, tuned, exports, a model folder, a hub name, a GGUF file, an endpoint.

Nothing is loaded here: a system loads itself when it is first asked something that is not remembered.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from afina.artifact import MANIFEST, folder_digest, open_artifact, sha256
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import ModelError, RecipeError
from afina.evaluate.systems.asking import Answering, System
from afina.evaluate.systems.endpoint import EndpointAnswering
from afina.evaluate.systems.gguf import GgufAnswering, PromptOf, Weighing
from afina.evaluate.systems.transformer import ModelAnswering, as_it_is
from afina.language import _
from afina.model.endpoint import Endpoint
from afina.model.load import choose_hardware, load_model
from afina.model.saved import load_adapter
from afina.model.vocabulary import grow
from afina.recipe.place import model_source
from afina.recipe.schema import Model
from afina.train.reopen import Tuned, recipe_of, reopen

ADAPTER = "adapter_config.json"
TAKEN = frozenset(
    {"task", "sample", "where", "prompt", "expected", "right", "scores", "problems", "unanswered", "tokens", "before"}
)
"""Names of columns of predictions.jsonl, which no system can have."""


@dataclass
class Opening:
    """Makes systems. `prompt_of` uses a GGUF file's own template; `key_variable` names what holds an endpoint's key."""

    folder: Path
    prompt_of: PromptOf
    key_variable: str | None = None
    _runs: dict[Path, "_Run"] = field(default_factory=dict)

    def systems(self, names: Sequence[str], run: Path | None) -> list[System]:
        """One system for each name, `exports` for as many as there are. Raises AfinaError for a name that is none."""
        found: list[System] = []
        for name in names:
            if name in ("base", "tuned", "exports"):
                if run is None:
                    raise RecipeError(
                        _("There is no run whose {name} could be asked.").format(name=name),
                        hint=_("Name a run folder first, or a model, a GGUF file or an endpoint."),
                    )
                found += self._of_run(run, name)
            else:
                found.append(self.other(name))
        return _named(found)

    def other(self, name: str) -> System:
        """A system that is no part of the run being evaluated."""
        if name.startswith(("http://", "https://")):
            return self._endpoint(name)
        place = next((start / name for start in (self.folder, Path()) if (start / name).exists()), Path(name))
        if place.suffix == ".gguf":
            return self._gguf(place, place.stem)
        if (place / MANIFEST).is_file() and open_artifact(place).kind != "model":
            system = self._run(place).system("tuned")
            return System(place.resolve().name, "model", system.identity, system.open, system.facts)
        if (place / ADAPTER).is_file() and not (place / "config.json").is_file():
            return _model(self._base_of(place), place.resolve().name, place)
        return _model(model_source(name, self.folder), Path(name).name or name)

    def _base_of(self, adapter: Path) -> str:
        """The model that an adapter in PEFT's format says it belongs to. Raises ModelError."""
        try:
            name = json.loads((adapter / ADAPTER).read_bytes())["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ModelError(
                _("This adapter does not say which base it belongs to."),
                file=adapter / ADAPTER,
                hint=_("Set base_model_name_or_path in it to a model folder or hub name."),
            ) from error
        return model_source(str(name), self.folder)

    def _of_run(self, run: Path, name: str) -> list[System]:
        if name != "exports":
            return [self._run(run).system(name)]
        if not (run / "export" / MANIFEST).is_file():
            return []
        entries = open_artifact(run / "export").manifest["exports"]
        files = [(run / "export" / entry["file"], entry["format"]) for entry in entries if entry["format"] != "lora"]
        return [self._gguf(file, kind) for file, kind in files if file.suffix == ".gguf"]

    def _run(self, run: Path) -> "_Run":
        return self._runs.setdefault(run.resolve(), _Run(run))

    def _gguf(self, file: Path, name: str) -> System:
        try:
            program = metadata.version("xllamacpp")
        except metadata.PackageNotFoundError:
            program = "-"

        @contextmanager
        def opened() -> Iterator[Answering]:
            with Weighing(file) as llama:
                yield GgufAnswering(llama, self.prompt_of(llama))

        size = file.stat().st_size
        identity = f"gguf {sha256(file)} {program}"
        return System(name, "gguf", identity, opened, lambda: {"file_bytes": size, "memory_bytes": size})

    def _endpoint(self, name: str) -> System:
        url, _hash, model = name.partition("#")
        endpoint = Endpoint(url, model or "default", self.key_variable)

        @contextmanager
        def opened() -> Iterator[Answering]:
            yield EndpointAnswering(endpoint)

        return System(endpoint.name, "endpoint", f"endpoint {url} {model}", opened, reads=False)


@dataclass
class _Run:
    """A run folder, loaded once for base and tuned."""

    place: Path

    @cached_property
    def tuned(self) -> Tuned:
        """Loaded with the first question."""
        return reopen(self.place)

    @cached_property
    def whole_base(self) -> nn.Module:
        """The base of a fully tuned model, which is a model of its own, with room for turn tokens that were added."""
        recipe = self.tuned.recipe
        source = model_source(recipe.model.base, self.tuned.folder)
        model = load_model(source, self.tuned.hardware, recipe.model)
        grow(model, 1 + max(self.tuned.renderer.tokenizer.control_tokens.values(), default=0))
        return model

    def system(self, name: str) -> System:
        """`base` or `tuned`, by the hashes that the manifest states."""
        run = open_artifact(self.place, "run")
        recipe, folder = recipe_of(run)
        files = {key: entry["sha256"] for key, entry in run.manifest["files"].items() if key.startswith("adapter/")}
        words = {key: value for key, value in files.items() if "token" in key or "template" in key}
        base = [entry["sha256"] for entry in run.manifest["parents"] if entry["role"] == "base"]
        parts = [recipe.model.base, base, words if name == "base" else files, str(choose_hardware(recipe.model))]
        identity = f"{name} {hashlib.sha256(repr(parts).encode()).hexdigest()}"
        full, source = recipe.method.name == "full", Path(model_source(recipe.model.base, folder))
        adapter = sum(
            entry["bytes"] for key, entry in run.manifest["files"].items() if key.startswith("adapter/adapter_")
        )
        stored = _weights(self.place / "adapter") if full and name == "tuned" else _weights(source)
        on_disk = stored + (adapter if name == "tuned" and not full else 0)

        @contextmanager
        def opened() -> Iterator[Answering]:
            tuned = self.tuned
            if full and name == "base":
                yield ModelAnswering(self.whole_base, tuned.renderer, tuned.hardware, as_it_is)
            else:
                active: Callable[[], AbstractContextManager[object]] = tuned.base if name == "base" else as_it_is
                yield ModelAnswering(tuned.model, tuned.renderer, tuned.hardware, active)

        def facts() -> dict[str, Any]:
            if "tuned" not in self.__dict__:
                return {"file_bytes": on_disk}
            model = self.whole_base if full and name == "base" else self.tuned.model
            return {"file_bytes": on_disk, "memory_bytes": _held(model, adapters=name == "tuned")}

        return System(name, "base" if name == "base" else "tuned", identity, opened, facts)


def _model(source: str, name: str, adapter: Path | None = None) -> System:
    """A model folder or hub name, with its own tokenizer and template; an `adapter` on it may bring its own."""
    hardware = choose_hardware(Model())
    digest = folder_digest(Path(source)) if Path(source).is_dir() else source
    words = source
    if adapter is not None:
        digest += folder_digest(adapter)
        words = str(adapter) if (adapter / "tokenizer_config.json").is_file() else source
    loaded: list[nn.Module] = []

    @contextmanager
    def opened() -> Iterator[Answering]:
        base = load_model(source, hardware)
        loaded[:] = [base if adapter is None else load_adapter(base, adapter).eval()]
        try:
            yield ModelAnswering(loaded[0], Renderer(load_tokenizer(words)), hardware, as_it_is)
        finally:
            memory.update(memory_bytes=_held(loaded[0], adapters=True))
            loaded.clear()

    memory: dict[str, int] = {}
    stored = _weights(Path(source)) + (_weights(adapter) if adapter else 0)
    return System(name, "model", f"model {digest} {hardware}", opened, lambda: {"file_bytes": stored or None, **memory})


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _held(model: nn.Module, *, adapters: bool) -> int:
    """Bytes of the weights in memory."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if adapters or "lora_" not in name
    )


def _named(systems: list[System]) -> list[System]:
    """Names that no two share, and that are no columns."""
    seen: dict[str, int] = {}
    found = []
    for system in systems:
        name = f"{system.name}_" if system.name in TAKEN else system.name
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name}-{seen[name]}"
        found.append(System(name, system.kind, system.identity, system.open, system.facts, system.reads))
    return found
