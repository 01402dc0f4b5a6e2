"""A transformers model folder as one GGUF file, the format of llama.cpp, Ollama and LM Studio.

A door to the `gguf` package, which writes the head of the file and knows the names of tensors. What stands in the head
is gguf_head.py's, what the architectures are families.py's, what is stored in which type mixes.py's, the blocks of few
bits quants.py's, the tokenizer gguf_vocab.py's. A few rows a thread are in memory at a time: they are read, encoded and
written side by side.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import torch

from afina import durable
from afina.errors import ModelError
from afina.export import quants
from afina.export.experts import open_source
from afina.export.families import EMBEDDING, HEAD, Family, Shape, read_shape
from afina.export.gguf_head import add_metadata, position_tables, safe_name
from afina.export.gguf_vocab import read_vocabulary
from afina.export.mixes import PLAIN, Mix
from afina.export.weights import Source
from afina.language import _

DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry although they follow from the configuration."""
CPU_JOB, GPU_JOB = 2**21, 2**24
"""Weights that a thread reads and converts at once: 4 MB of bf16 on a CPU. A GPU wants more."""
GPU_THREADS = 4
"""Threads that keep a GPU busy: while it encodes, others read, copy and wait for what is done."""

Importance = Mapping[str, torch.Tensor]
"""For source tensors, by name: (columns,) mean square of what each column is multiplied with."""


@dataclass(frozen=True)
class Plan:
    """One tensor of the file: its name there, its name in the source, its shape, the type it is stored in, the type
    the format meant for it.

    `heads` is how many heads the rows of an interleaved projection belong to, else 0. `plus` is added to each value.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    meant: str
    heads: int = 0
    plus: float = 0.0

    @property
    def type(self) -> Any:
        """The type as the gguf package names it."""
        return gguf.GGMLQuantizationType[self.kind.upper()]

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensor."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


def planned_bytes(model_folder: Path, kind: str) -> int:
    """Bytes of the tensors that `write_gguf` would write; reads no weights. Raises ModelError as it does."""
    shape = read_shape(model_folder)
    with closing(open_source(model_folder, shape.family.architecture)) as source:
        return sum(plan.bytes for plan in _plan_tensors(shape, source, kind, model_folder, False))


def write_gguf(
    model_folder: Path,
    out: Path,
    kind: str,
    *,
    name: str | None = None,
    importance: Importance | None = None,
    device: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the model in `model_folder` (as save_pretrained leaves it) to the GGUF file `out`, in a format of mixes.py.

    "f32" keeps every weight exactly. `importance` steers the rounding. `device` is where blocks are searched ("cuda"
    where there is one). `on_progress` is told how many weights were written since it was last called.

    Returns the facts: `bytes`, `tensors`, `architecture`, `kind`, `name`, `parameters`, `tokenizer`, `types` (tensors
    of each type), `not_quantised` (names of matrices left in 16 bits although the format quantises), `fallbacks` (name:
    "meant as q4_k, stored as q5_0"), `bits_per_weight`, `notes` (sentences on what llama.cpp does otherwise) and
    `exact` (whether its arithmetic is the model's but for what the format rounds). Raises ModelError when llama.cpp
    could not run the model as it was trained, OutputError when `out` exists or cannot be written.
    """
    shape = read_shape(model_folder)
    vocabulary = read_vocabulary(model_folder)
    title = safe_name(name or model_folder.resolve().name)
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_source(model_folder, shape.family.architecture)))
        rows = source.shape(EMBEDDING)[0]
        if rows < len(vocabulary.tokens):
            raise ModelError(
                _("The tokenizer has {tokens} tokens but the model only {rows} embeddings.").format(
                    tokens=len(vocabulary.tokens), rows=rows
                ),
                file=model_folder,
            )
        vocabulary.pad_to(rows)
        plans = _plan_tensors(shape, source, kind, model_folder, importance is not None)
        temporary = stack.enter_context(durable.new_file(out))
        tables = position_tables(shape)
        with closing(gguf.GGUFWriter(temporary, shape.family.architecture)) as writer:
            add_metadata(writer, shape, vocabulary, kind, title)
            _write_head(writer, plans, tables)
        with temporary.open("ab") as file, _workers(device) as pool:
            for table in tables.values():
                _align(file)
                file.write(table.data)
            jobs = (job for plan in plans for job in _jobs(source, plan, importance, device))
            for job, converted in _in_order(pool, jobs):
                if job.start == 0:
                    _align(file)
                file.write(converted.data)
                if on_progress is not None:
                    on_progress(job.weights)
            _align(file)
    parameters = sum(math.prod(plan.shape) for plan in plans)
    types = _counted(plan.kind for plan in plans)
    in_eight_bits = kind in PLAIN and "mxfp4" in types
    eight = [_("llama.cpp rounds what experts in MXFP4 are multiplied with to 8 bits, in this format too.")]
    return {
        "bytes": out.stat().st_size,
        "tensors": len(plans) + len(tables),
        "architecture": shape.family.architecture,
        "kind": kind,
        "name": title,
        "parameters": parameters,
        "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre},
        "types": types,
        "not_quantised": [
            plan.name for plan in plans if kind not in PLAIN and len(plan.shape) > 1 and plan.kind in PLAIN
        ],
        "fallbacks": {
            plan.name: f"meant as {plan.meant}, stored as {plan.kind}" for plan in plans if plan.kind != plan.meant
        },
        "bits_per_weight": round(8 * sum(plan.bytes for plan in plans) / parameters, 3),
        "notes": [*shape.notes, *(eight if in_eight_bits else []), *vocabulary.notes],
        "exact": not (in_eight_bits or shape.turned_otherwise),
    }


def write_tensors(out: Path, shape: Shape, tensors: Mapping[str, torch.Tensor], alpha: float, name: str) -> None:
    """An adapter of low-rank pairs: `tensors` by the name of the matrix they belong to, "|lora_a" or "|lora_b"."""
    known = gguf.get_tensor_name_map(_architecture(shape.family), shape.layers)
    with durable.new_file(out) as temporary, closing(gguf.GGUFWriter(temporary, shape.family.architecture)) as writer:
        writer.add_type("adapter")
        writer.add_name(safe_name(name))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for key, tensor in tensors.items():
            source, _bar, side = key.partition("|")
            new = known.get_name(source, try_suffixes=(".weight",))
            if new is None:
                raise ModelError(_("GGUF has no name for the tensor {name}.").format(name=source))
            writer.add_tensor(f"{new}.{side}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _counted(kinds: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _plan_tensors(shape: Shape, source: Source, kind: str, model_folder: Path, importance: bool) -> list[Plan]:
    """Every tensor the architecture has, none missing and none left over."""
    names = list(shape.expected(source.names()))
    left_over = {name for name in source.names() - set(names) if not DERIVED.search(name)}
    if shape.tied:
        left_over -= {HEAD}
    if left_over:
        raise ModelError(
            _("llama.cpp has no place for these tensors of the model: {names}.").format(
                names=", ".join(sorted(left_over)[:5])
            ),
            hint=_("A model with an adapter must be merged before it is exported."),
            file=model_folder,
        )
    known = gguf.get_tensor_name_map(_architecture(shape.family), shape.layers)
    mix = Mix(kind, shape.layers, shape.heads, shape.kv_heads, shape.tied, importance)
    vocabulary = source.shape(EMBEDDING)[0]
    plans = []
    for name in names:
        size = source.shape(name)
        if size != shape.size(name, vocabulary):  # llama.cpp ends the process on such a file
            raise ModelError(
                _("The tensor {name} has the shape {found}; config.json says {expected}.").format(
                    name=name, found=size, expected=shape.size(name, vocabulary)
                ),
                file=model_folder,
            )
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(_("GGUF has no name for the tensor {name}.").format(name=name), file=model_folder)
        # Vectors are few and sensitive, and so is what chooses the experts: norms, biases and router stay in F32.
        plain = len(size) == 1 or name.endswith((".bias", ".router.weight"))
        stored, meant = ("f32", "f32") if plain else mix.choose(new, size[-1])
        if source.packed(name):
            stored = meant = "mxfp4"
        plus = 1.0 if shape.family.norms_from_one and name.endswith("norm.weight") else 0.0
        plans.append(Plan(new, name, size, stored, meant, shape.interleaved_heads(name), plus))
    return plans


def _architecture(family: Family) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)


def _write_head(writer: Any, plans: list[Plan], tables: Mapping[str, np.ndarray]) -> None:
    for name, table in tables.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    for plan in plans:
        shape = plan.shape
        if plan.kind not in ("f32", "f16"):  # the package takes the shape in bytes here
            shape = gguf.quant_shape_to_byte_shape(shape, plan.type)
            writer.add_tensor_info(plan.name, shape, np.dtype(np.uint8), plan.bytes, raw_dtype=plan.type)
        else:
            writer.add_tensor_info(plan.name, shape, np.dtype(np.float32), plan.bytes, raw_dtype=plan.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _align(file: IO[bytes]) -> None:
    """Go to the next place where a tensor may begin; the end of the file must be one too."""
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


@dataclass(frozen=True)
class Job:
    """Rows `start` to `stop` of a tensor, to be read and converted."""

    source: Source
    plan: Plan
    start: int
    stop: int
    importance: torch.Tensor | None
    device: str | None

    @property
    def weights(self) -> int:
        """How many there are."""
        return (self.stop - self.start) * math.prod(self.plan.shape[1:])

    def __call__(self) -> np.ndarray:
        """The rows' bytes in the file."""
        if self.source.packed(self.plan.source):
            blocks: np.ndarray = self.source.mxfp4(self.plan.source, self.start, self.stop).numpy()
            return blocks
        rows = self.source.rows(self.plan.source, self.start, self.stop)
        return np.ascontiguousarray(_convert(rows, self.plan, self.importance, self.device))


def _jobs(source: Source, plan: Plan, importance: Importance | None, device: str | None) -> Iterator[Job]:
    """A tensor in pieces that can be converted apart: a head's rows stay together where they change places."""
    rows = plan.shape[0]
    together = rows // plan.heads if plan.heads else 1
    most = CPU_JOB if device is None else GPU_JOB
    step = max(1, most // math.prod(plan.shape[1:]) // together) * together
    columns = None if importance is None else importance.get(plan.source)
    for start in range(0, rows, step):
        yield Job(source, plan, start, min(rows, start + step), columns, device)


@contextmanager
def _workers(device: str | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone. The operations are too short to be shared, and threads that wait for each other
    after each of them stand still on a busy machine (30 times slower where eight processes shared two cores)."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        before if device is None else GPU_THREADS, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    """What the jobs give, in their order; a few are under way while one is written."""
    under_way: deque[tuple[Job, Future[np.ndarray]]] = deque()
    for job in jobs:
        under_way.append((job, pool.submit(job)))
        if len(under_way) > 2 * pool._max_workers:
            first, result = under_way.popleft()
            yield first, result.result()
    for first, result in under_way:
        yield first, result.result()


def _convert(
    tensor: torch.Tensor, plan: Plan, importance: torch.Tensor | None = None, device: str | None = None
) -> np.ndarray:
    """The bytes of some rows. Raises ModelError when a value is not finite, in the source or as stored."""
    if plan.heads:
        tensor = interleave(tensor, tensor.shape[0] * plan.heads // plan.shape[0])
    if plan.plus:
        tensor = tensor.float() + plan.plus
    if plan.kind in quants.BLOCKS:
        rows = tensor if device is None else tensor.to(device)
        try:
            array: np.ndarray = quants.encode(rows.flatten(0, -2), plan.kind, importance).cpu().numpy()
        except quants.NotFinite:
            raise _not_finite(tensor, plan) from None
        return array
    stored = tensor.to(torch.float16 if plan.kind == "f16" else torch.float32)
    if not quants.is_finite(stored):
        raise _not_finite(tensor, plan)
    array = stored.contiguous().numpy()
    return array if plan.kind in ("f32", "f16") else gguf.quants.quantize(array, plan.type)


def _not_finite(tensor: torch.Tensor, plan: Plan) -> ModelError:
    if bool(torch.isfinite(tensor).all()):
        return ModelError(
            _("A weight of {name} is too large for F16.").format(name=plan.source),
            hint=_("Export as f32 or q8_0."),
        )
    return ModelError(
        _("A weight of {name} is not a number.").format(name=plan.source),
        hint=_("The training diverged; go back to an earlier checkpoint."),
    )


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * d, ...) with each head's halves woven into pairs: 0, d/2, 1, d/2 + 1, ...

    transformers rotates element i with i + d/2, llama.cpp (for this family) 2i with 2i + 1.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
