"""A checkpoint: the loop's state on disk, complete and verified or not there at all. Door to safetensors.

    checkpoints/000007-step-340/    the number of the save, and the steps behind it
        state.safetensors           what learns, and AdamW's moments and steps, by name
        checkpoint.json             everything else, and the hash of the file above; it carries its own hash too

No pickle, no name or path that is read from a file is followed. Every save has a number of its own, so nothing is ever
overwritten, and the newest is the highest number whose hashes hold (Pillai et al., OSDI 2014, on why the rest matters).
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load_file

from afina import durable
from afina.artifact import sha256
from afina.errors import OutputError
from afina.language import _
from afina.train.memory import within_memory
from afina.train.state import State
from afina.train.watch import Watch

FORMAT = 1
TENSORS, FACTS = "state.safetensors", "checkpoint.json"
FACTS_BYTES = 2**26
"""No checkpoint.json is read beyond this."""
SPARE = 2
"""A copy is made on the GPU when this many times its size is free there."""
PINNED_BYTES = 2**30
"""Up to so many the GPU copies into memory that is pinned once and used again; more is copied through the driver's."""
NAME = re.compile(r"(\d{6,12})-step-(\d{1,12})")


class Damaged(Exception):
    """Why a checkpoint cannot be used, in words for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """One whose hashes hold. `facts` is what was given to `write`."""

    place: Path
    number: int
    step: int
    facts: dict[str, Any]
    digest: str


class Layout:
    """Where a state's tensors lie, by name: looked up once, as hundreds of names and views take longer than a snapshot.

    tensors: what learns, and the optimiser's moments; numbers: what bitsandbytes counts in plain ones, by name, with
    the place where they are read. flat: of those on a GPU, type by type, names and shapes, and all of them in one row.
    """

    def __init__(self, state: State) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, tuple[dict[str, Any], str]] = {}
        self._weights: list[tuple[torch.nn.Parameter, int, dict[str, Any]]] = []
        self._moments: list[tuple[dict[str, Any], str, Any]] = []
        for name, parameter in state.learning.items():
            memory = state.optimizer.state[parameter]
            self.tensors[f"{name}|weight"] = parameter.detach()
            self._weights.append((parameter, parameter.data_ptr(), memory))
            for key, value in memory.items():
                if isinstance(value, torch.Tensor):
                    self.tensors[f"{name}|{key}"] = value
                    self._moments.append((memory, key, value))
                else:
                    self.numbers[f"{name}|{key}"] = memory, key
        self.on_gpu = {name: tensor for name, tensor in self.tensors.items() if tensor.is_cuda}
        self.size = sum(tensor.nbytes for tensor in self.on_gpu.values())
        self.paged = any(getattr(tensor, "is_paged", False) for tensor in self.tensors.values())
        self.flat = [_in_a_row(group) for group in _by_type(self.on_gpu)]

    def holds(self, state: State) -> bool:
        """Whether these are still the state's own, each where it was."""
        return (
            len(self._weights) == len(state.learning)
            and all(state.optimizer.state[p] is memory and p.data_ptr() == at for p, at, memory in self._weights)
            and all(memory.get(key) is value for memory, key, value in self._moments)
        )


@dataclass(frozen=True)
class Row:
    """Tensors of one type: their names and shapes, and how each is seen as one row, which copies none of them."""

    entries: list[tuple[str, torch.Size]]
    views: list[torch.Tensor]
    scattered: list[torch.Tensor]
    """Those that no such view shows, the last of the entries."""

    def copy(self) -> torch.Tensor:
        """All their values end to end, in a handful of launches."""
        return torch.cat([*self.views, *(tensor.flatten() for tensor in self.scattered)])


def _by_type(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    kinds: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.dtype, {})[name] = tensor
    return list(kinds.values())


def _in_a_row(group: dict[str, torch.Tensor]) -> Row:
    dense = {name: tensor for name, tensor in group.items() if tensor.is_contiguous()}
    scattered = {name: tensor for name, tensor in group.items() if name not in dense}
    entries = [(name, tensor.shape) for name, tensor in (*dense.items(), *scattered.items())]
    return Row(entries, [tensor.view(-1) for tensor in dense.values()], list(scattered.values()))


class Snapshot:
    """Copies of tensors as they are between two steps: the loop may go on at once.

    On a GPU with room for it they are made there, laid end to end so that hundreds take a handful of launches, and
    `fetch`, in the thread that writes, brings them to main memory beside the computation. `finite`, after it: whether
    all are numbers; only such a state is good to go back to.
    """

    finite = True

    def __init__(self, layout: Layout) -> None:
        rest, on_gpu = layout.tensors, layout.on_gpu
        self._flat: list[tuple[list[tuple[str, torch.Size]], torch.Tensor]] | None = None
        self._ready: torch.cuda.Event | None = None
        if on_gpu and torch.cuda.mem_get_info(next(iter(on_gpu.values())).device)[0] > SPARE * layout.size:
            self._flat = within_memory(lambda: [(row.entries, row.copy()) for row in layout.flat])
            self._ready = torch.cuda.Event()
            self._ready.record()
        if layout.paged:
            torch.cuda.synchronize()  # the GPU may still be writing what the computer reads
        if self._flat is not None:
            rest = {name: tensor for name, tensor in rest.items() if name not in on_gpu}
        self._copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in rest.items()}
        self._copies |= {name: torch.tensor(memory[key]) for name, (memory, key) in layout.numbers.items()}

    def fetch(self) -> dict[str, torch.Tensor]:
        """All of them in main memory, once."""
        copies, self._copies, flat, self._flat = self._copies, {}, self._flat or [], None
        self.finite = all(_is_finite(tensor) for tensor in copies.values())
        if self._ready is not None:
            self._ready.synchronize()  # lets go of Python's lock, for which the loop waits while this thread begins
            with torch.cuda.stream(torch.cuda.Stream()):
                for entries, whole in flat:
                    here = _in_main_memory(whole)
                    self.finite &= _is_finite(whole)
                    parts = here.split([shape.numel() for _name, shape in entries])
                    copies |= {name: part.view(shape) for (name, shape), part in zip(entries, parts, strict=True)}
        return copies


def _in_main_memory(whole: torch.Tensor) -> torch.Tensor:
    """A copy there of a tensor on the GPU, made on the current stream."""
    pinned = partial(torch.empty_like, whole, device="cpu", pin_memory=True)
    here = within_memory(pinned) if whole.nbytes <= PINNED_BYTES else None
    if here is None:
        return whole.to("cpu")
    here.copy_(whole, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return here


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither infinity nor what is no number in it: both show in its least and greatest element."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def snapshot(state: State) -> dict[str, torch.Tensor]:
    """Copies of all that learns and of the optimiser's moments, in main memory."""
    return Snapshot(Layout(state)).fetch()


def facts_of(state: State) -> dict[str, Any]:
    """What else a step changes, as plain values."""
    return {
        "validated": state.validated,
        "last": state.last,
        "scaler": state.scaler.state_dict(),
        "watch": state.watch.dump(),
    }


def write(folder: Path, run: str, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Checkpoint:
    """Save under the next number. Raises OutputError when the disk refuses; then nothing has changed."""
    number = max((other for other, _step, _place in listed(folder)), default=0) + 1
    place = folder / f"{number:06d}-step-{step}"
    with durable.new_folder(place) as temporary:
        _save(tensors, temporary / TENSORS)
        digest = sha256(temporary / TENSORS)
        body = {"format": FORMAT, "run": run, "number": number, "step": step, "sha256": digest, **facts}
        durable.write_json(temporary / FACTS, {"sha256": _digest(body), "body": body})
    return Checkpoint(place, number, step, body, digest)


def read(place: Path, run: str) -> Checkpoint:
    """Verify one checkpoint of `run`. Raises Damaged, and OutputError for one of a newer version."""
    if not (match := NAME.fullmatch(place.name)) or not stat.S_ISDIR(place.lstat().st_mode):
        raise Damaged(_("it is no folder of ours"))
    for name in (FACTS, TENSORS):
        try:
            found = (place / name).lstat()
        except OSError as error:
            raise Damaged(_("{file} is missing").format(file=name)) from error
        if not stat.S_ISREG(found.st_mode) or (name == FACTS and found.st_size > FACTS_BYTES):
            raise Damaged(_("{file} is no plain file").format(file=name))
    try:
        content = json.loads((place / FACTS).read_bytes())
        body, whole = content["body"], content["sha256"] == _digest(content["body"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(_("{file} cannot be read").format(file=FACTS)) from error
    if not whole or not isinstance(body, dict):
        raise Damaged(_("{file} does not match its hash").format(file=FACTS))
    if isinstance(body.get("format"), int) and body["format"] > FORMAT:
        raise OutputError(
            _("{place} was written by a newer version of afina.").format(place=place),
            hint=_("Go on with that version, or remove the run folder to begin anew."),
        )
    if body.get("format") != FORMAT:
        raise Damaged(_("it was written by another version of afina"))
    if body.get("run") != run:
        raise Damaged(_("it belongs to another run"))
    if (body.get("number"), body.get("step")) != (int(match[1]), int(match[2])):
        raise Damaged(_("its name was changed"))
    try:
        digest = sha256(place / TENSORS)
    except OSError as error:
        raise Damaged(_("{file} cannot be read").format(file=TENSORS)) from error
    if digest != body.get("sha256"):
        raise Damaged(_("{file} does not match its hash").format(file=TENSORS))
    return Checkpoint(place, int(match[1]), int(match[2]), body, digest)


def newest(
    folder: Path,
    run: str,
    on_damaged: Callable[[Path, str], None],
    suits: Callable[[Checkpoint], bool] = lambda checkpoint: True,
) -> Checkpoint | None:
    """The newest checkpoint of `run` whose hashes hold, and that suits; each that is damaged is told."""
    for _number, _step, place in sorted(listed(folder), reverse=True):
        try:
            checkpoint = read(place, run)
        except Damaged as damage:
            on_damaged(place, str(damage))
            continue
        if suits(checkpoint):
            return checkpoint
    return None


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of one. Raises Damaged."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(checkpoint.place / TENSORS)
    except (OSError, SafetensorError, ValueError) as error:
        raise Damaged(_("{file} cannot be read").format(file=TENSORS)) from error
    return tensors


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Turn `state` into what was saved, in place. Raises Damaged when other weights learn now; then nothing changed."""
    tensors = tensors_of(checkpoint)
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in state.learning.items():
        targets[f"{name}|weight"] = parameter
        memory = state.optimizer.state[parameter]
        targets |= {f"{name}|{key}": torch.as_tensor(value) for key, value in memory.items()}
    if {name: (t.shape, t.dtype) for name, t in tensors.items()} != {n: (t.shape, t.dtype) for n, t in targets.items()}:
        raise Damaged(_("other weights learn now than when it was saved"))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    for name, parameter in state.learning.items():
        memory = state.optimizer.state[parameter]
        counts = [key for key, value in memory.items() if not isinstance(value, torch.Tensor)]
        memory |= {key: int(tensors[f"{name}|{key}"]) for key in counts}
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint.facts["scaler"])
    state.watch = Watch()
    state.watch.load(checkpoint.facts["watch"])
    state.step, state.validated = checkpoint.step, checkpoint.facts["validated"]
    state.last = checkpoint.facts["last"]


def prune(folder: Path, kept: Collection[Path]) -> None:
    """Remove every checkpoint but `kept`, once those are on the disk for good."""
    for _number, _step, place in listed(folder):
        if place not in kept:
            durable.remove(place)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Contiguous tensors in main memory. safetensors' function for tensors looks for 30 microseconds at each, whether
    they share memory, with Python's lock, for which the loop waits meanwhile."""
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }  # fmt: skip
    try:
        serialize_file(specs, file)
    except SafetensorError as error:  # it tells what the operating system said in words alone
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def listed(folder: Path) -> list[tuple[int, int, Path]]:
    """Number, step and place of what is named as a checkpoint is."""
    if not folder.is_dir():
        return []
    matches = ((NAME.fullmatch(place.name), place) for place in folder.iterdir())
    return [(int(match[1]), int(match[2]), place) for match, place in matches if match]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
