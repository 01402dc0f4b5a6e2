"""What we accept llama.cpp loads; what it refuses we refuse: real llama.cpp on variations of a whole model."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, TELLING, U8, U32, U64, Bytes
from small import llama
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from afina.errors import ModelError
from afina.export.gguf import write_gguf
from afina.gguf_file import GgufFile, Strings, read_head

pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to compare with real llama.cpp')


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model that llama.cpp loads, in Q8_0 and F32."""
    folder = tmp_path_factory.mktemp("model")
    llama(vocab_size=260, tie_word_embeddings=True, hidden_size=32).save_pretrained(folder)
    pieces = ["<pad>", "<u>", "</u>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<u>", "</u>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</u>").save_pretrained(folder)
    write_gguf(folder, folder / "model.gguf", "q8_0")
    return (folder / "model.gguf").read_bytes()


def rewritten(whole: bytes, *, extra: list[tuple[Any, int, Any]] = (), alignment: int = 32, version: int = 3) -> Bytes:  # type: ignore[assignment]
    """The same model written by another hand: more metadata, another alignment or version."""
    head = read_head(whole)
    metadata_end = _metadata_end(whole)
    made = Bytes(bytearray(b"GGUF"))
    made.number("I", version)
    made.number("Q", len(head.tensors))
    made.number("Q", len(head.metadata) + len(extra))
    made.content += whole[24:metadata_end]
    for entry in extra:
        made.entry(*entry)
    offset = 0
    numbers = {"f32": 0, "f16": 1, "q8_0": 8}
    for tensor in head.tensors.values():
        made.tensor(tensor.name, list(tensor.shape[::-1]), numbers[tensor.kind], offset)
        offset += tensor.bytes + -tensor.bytes % alignment
    for tensor in head.tensors.values():
        made.content += bytes(-len(made.content) % alignment)
        made.content += whole[tensor.start : tensor.start + tensor.bytes]
    made.content += bytes(-len(made.content) % alignment)
    return made


def _metadata_end(whole: bytes) -> int:
    """Where the first tensor is described: before the length of its name."""
    first = next(iter(read_head(whole).tensors)).encode()
    return whole.index(struct.pack("<Q", len(first)) + first)


def meaning(content: bytes) -> Any:
    head = read_head(content)
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, Strings) else value
        for key, value in head.metadata.items()
        if not key.startswith(("extra", "general.alignment"))
    }
    return plain, {name: (tensor.kind, tensor.shape) for name, tensor in head.tensors.items()}


def variations(whole: bytes) -> dict[str, bytes]:
    """Right files, wrong files, and files that were drawn: name to content."""
    extras: list[tuple[Any, int, Any]] = [
        ("extra.u8", U8, 255),
        ("extra.bool", BOOL, 1),
        ("extra.text", STRING, "é\n" * 50),
        ("extra.nothing", STRING, ""),
        ("extra.u64", U64, 2**64 - 1),
        ("extra.floats", ARRAY, (F32, [0.5] * 9)),
        ("extra.none", ARRAY, (STRING, [])),
        ("extra.words", ARRAY, (STRING, ["", "a"])),
        ("extra.flags", ARRAY, (BOOL, [0, 1])),
    ]
    aligned = {size: [("general.alignment", U32, size)] for size in (1, 8, 64, 4096)}
    found = {
        "as it is": whole,
        "by another hand": bytes(rewritten(whole).content),
        "version 2": bytes(rewritten(whole, version=2).content),
        "more metadata": bytes(rewritten(whole, extra=extras).content),
        "bytes after it": whole + b"left over",
        **{
            f"alignment {size}": bytes(rewritten(whole, extra=a, alignment=size).content) for size, a in aligned.items()
        },
        "alignment 0": bytes(rewritten(whole, extra=[("general.alignment", U32, 0)]).content),
        "alignment 48": bytes(rewritten(whole, extra=[("general.alignment", U32, 48)], alignment=48).content),
        "alignment as i32": bytes(rewritten(whole, extra=[("general.alignment", I32, 32)]).content),
        "alignment said and not kept": bytes(rewritten(whole, extra=aligned[64]).content),
        "a key twice": bytes(rewritten(whole, extra=[("extra", U8, 1), ("extra", U8, 1)]).content),
        "an empty key": bytes(rewritten(whole, extra=[("", U8, 1)]).content),
        "an array of arrays": bytes(rewritten(whole, extra=[("extra", ARRAY, (ARRAY, []))]).content),
        "an array of 2^63 texts": bytes(rewritten(whole, extra=[("extra", ARRAY, (STRING, [], 2**63))]).content),
        "version 1": bytes(rewritten(whole, version=1).content),
        "version 4": bytes(rewritten(whole, version=4).content),
        "cut": whole[:-64],
        "cut in the tensors": whole[: _metadata_end(whole) + 100],
    }
    draw = random.Random(5)
    made = rewritten(whole, extra=extras)
    told = [place for place in made.fields if place[0] >= _metadata_end(whole)] + made.fields[:3]
    for number in range(40):
        content = bytearray(made.content)
        at, width = draw.choice(told)
        near = int.from_bytes(content[at : at + width], "little") + draw.choice((-1, 1, 32))
        value = draw.choice((near, draw.choice(TELLING)))
        content[at : at + width] = (value % 256**width).to_bytes(width, "little")
        found[f"drawn {number}"] = bytes(content)
    return found


def test_our_verdicts_and_those_of_llamacpp(whole: bytes, tmp_path: Path) -> None:
    files = variations(whole)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "model.load_gguf", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs.keys() == files.keys()
    accepted = set()
    for name in files:
        try:
            GgufFile(tmp_path / name)
            accepted.add(name)
        except ModelError:
            continue
    refused = {name for name, verdict in theirs.items() if verdict != "loads"}
    same = {name for name in accepted if meaning(files[name]) == meaning(whole)}
    assert not same & refused, "we accept what llama.cpp refuses"
    # What we accept and it refuses is another model: a tensor of another name or shape.
    assert all(name.startswith("drawn") for name in accepted & refused), accepted & refused
    assert {"as it is", "by another hand", "version 2", "more metadata", "alignment 4096"} <= same
    assert theirs["alignment 8"] == "ends the process" and "alignment 8" not in accepted
    assert {"alignment 0", "an array of arrays", "version 4", "cut"} <= refused - accepted
    print(f"{len(files)} files: {len(accepted)} accepted here, {len(files) - len(refused)} there")
