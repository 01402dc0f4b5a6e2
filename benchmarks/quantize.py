"""Encoders of few bits: their errors beside llama.cpp's, and how long a whole model takes.

    python benchmarks/quantize.py errors [--ggml LIBGGML_BASE]
    python benchmarks/quantize.py speed [--shape 1b] [--formats q8_0,q4_k_m] [--device cuda] [--peer PYTHON]
    python benchmarks/quantize.py models [--peer PYTHON]
    python benchmarks/quantize.py quality [--peer PYTHON] [--tokens 30000] [--formats q4_k_m,...] [--model FOLDER]

LIBGGML_BASE is ggml's shared library and PYTHON an interpreter with llama_cpp, both as the llama-cpp-python source
package builds them. `errors`: root mean square, ours over llama.cpp's, block for block from the same floats. `speed`:
a random model in bf16, safetensors to GGUF; the peer quantises a GGUF file in F16 that was made before, so its own
conversion is not counted. `models`: KL of each format on afina/tiny, ours and the peer's from the same F32 file.
`quality`: the same in
transformers on the dequantised files, over many tokens: KL and perplexity, ours over the peer's, with standard errors;
and whether the blocks are equal to the byte. Results are printed and appended to results/quantize.jsonl.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from afina.artifact import versions
from afina.data.conversation import Message, Sample
from afina.data.template import Renderer
from afina.data.tokenizer import load_tokenizer
from afina.export import certificate, quants
from afina.export.families import read_shape
from afina.export.gguf import write_gguf
from afina.export.mixes import FORMATS, PLAIN
from afina.gguf_file import GgufFile
from afina.model.load import choose_hardware, load_model
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Model

RESULTS = Path(__file__).parent / "results" / "quantize.jsonl"
TINY = BUNDLED / "tiny"
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "100m": (768, 2048, 12, 12, 4, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
QUESTIONS = [
    "Hello!",
    "What is 12 + 30?",
    "Write a Python function that adds two numbers.",
    "¿Cuánto es 7 x 8?",
    "Tell me about dogs.",
    "What is the capital of France?",
    "Sort the list [3,1,2].",
    "Translate good morning to Spanish.",
]
PEER = """
import ctypes, sys, time
from llama_cpp import llama_cpp as peer
source, out, kind, threads = sys.argv[1:]
parameters = peer.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(kind), int(threads)
started = time.perf_counter()
assert peer.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)) == 0
print(time.perf_counter() - started)
"""


def note(**facts: Any) -> None:
    """One result, printed and kept."""
    print(json.dumps(facts, ensure_ascii=False), flush=True)
    record = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **facts, "versions": versions()}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def by_ggml(library: Any, x: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    """The same rows by ggml's own quantiser."""
    block, size = quants.BLOCKS[kind]
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((x.shape[0], x.shape[1] // block * size), np.uint8)
    pointer = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
    rows, columns = (ctypes.c_int64(count) for count in x.shape)
    steer = ctypes.c_void_p(None if importance is None else importance.ctypes.data)
    number = int(gguf.GGMLQuantizationType[kind.upper()])
    library.ggml_quantize_chunk(number, *pointer, ctypes.c_int64(0), rows, columns, steer)
    return out


def errors(options: argparse.Namespace) -> None:
    library = ctypes.CDLL(options.ggml) if options.ggml else None
    torch.manual_seed(0)
    tiny = load_file(TINY / "model.safetensors")
    sets = {
        "normal": torch.randn(512, 2048) * 0.02,
        "student t, 4": torch.distributions.StudentT(4.0).sample((512, 2048)) * 0.02,
        "afina/tiny": torch.cat([x.float().reshape(-1, 256) for x in tiny.values() if x.ndim == 2]),
    }
    for kind in quants.BLOCKS:
        for name, x in sets.items():
            for steer in (None, torch.distributions.LogNormal(0.0, 1.0).sample((x.shape[1],))):
                started = time.perf_counter()
                ours = quants.encode(x, kind, steer).numpy()
                seconds = time.perf_counter() - started
                facts: dict[str, Any] = {"what": "errors", "kind": kind, "weights": name, "imatrix": steer is not None}
                facts |= {"rmse": rmse(ours, kind, x, steer), "million_weights_s": x.numel() / seconds / 1e6}
                if library is not None:
                    weights = None if steer is None else steer.numpy().astype(np.float32)
                    started = time.perf_counter()
                    theirs = by_ggml(library, x.numpy(), kind, weights)
                    facts["llama.cpp_million_weights_s"] = x.numel() / (time.perf_counter() - started) / 1e6
                    facts["rmse_over_llama.cpp"] = facts["rmse"] / rmse(theirs, kind, x, steer)
                note(**{key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()})


def rmse(stored: np.ndarray, kind: str, x: torch.Tensor, steer: torch.Tensor | None) -> float:
    """Relative root mean square error, columns weighted as they were when encoding."""
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind.upper()])
    cost = 1.0 if steer is None else steer.numpy()
    return float(np.sqrt((cost * (read - x.numpy()) ** 2).mean() / (cost * x.numpy() ** 2).mean()))


def lay_out(folder: Path, shape: str) -> None:
    """A random Llama in bf16, layer by layer in shards, with the tokenizer of afina/tiny."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    config |= dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, head_dim=hidden // heads
    )
    config |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    figures = read_shape(folder)
    index: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in figures.expected(set()):
        parts.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for part, names in parts.items():
        file = f"model-{part}.safetensors"
        tensors = {}
        for name in names:
            size = figures.size(name, vocabulary)
            tensors[name] = (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")


class Watch(threading.Thread):
    """The most memory of our own (not pages of files) that this process held."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(status.partition("RssAnon:")[2].split()[0]) * 1024)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def speed(options: argparse.Namespace) -> None:
    threads = len(os.sched_getaffinity(0)) if options.threads is None else options.threads
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder = Path(place) / "model"
        lay_out(folder, options.shape)
        if options.peer:
            write_gguf(folder, Path(place) / "f16.gguf", "f16")
        for kind in options.formats.split(","):
            out = Path(place) / "out.gguf"
            watch = Watch()
            watch.start()
            started = time.perf_counter()
            facts = write_gguf(folder, out, kind, device=options.device)
            seconds, most = time.perf_counter() - started, watch.stop()
            out.unlink()
            said = dict(seconds=round(seconds, 1), memory_gb=round(most / 1e9, 2), bytes=facts["bytes"])
            said |= dict(parameters=facts["parameters"], threads=threads, device=options.device or "cpu")
            if options.peer:
                said["llama.cpp_seconds"] = round(peer(options.peer, Path(place) / "f16.gguf", out, kind, threads), 1)
                out.unlink()
            note(what="speed", shape=options.shape, format=kind, **said)


def peer(python: str, source: Path, out: Path, kind: str, threads: int) -> float:
    number = int(gguf.LlamaFileType[FORMATS[kind][1]])
    command = [python, "-c", PEER, str(source), str(out), str(number), str(threads)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return float(done.stdout.split()[-1])


def models(options: argparse.Namespace) -> None:
    """Every format on afina/tiny, in llama.cpp."""
    certificate.LIMITS.update(dict.fromkeys(FORMATS, certificate.Limits(1e9, 0.0)))
    model = load_model(str(TINY), choose_hardware(Model(precision="fp32", device="cpu")))
    renderer = Renderer(load_tokenizer(str(TINY)))
    rows = [Sample((Message("user", text), Message("assistant", "x")), TINY, 1) for text in QUESTIONS]
    questions = certificate.pose(model, renderer, rows)
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / "f32.gguf"
        write_gguf(TINY, plain, "f32")
        for kind in FORMATS:
            files = {"ours": Path(place) / f"{kind}-ours.gguf"}
            facts = write_gguf(TINY, files["ours"], kind)
            if options.peer and kind not in (*PLAIN, "q2_k_s", "mxfp4"):
                files["llama.cpp"] = Path(place) / f"{kind}-peer.gguf"
                peer(options.peer, plain, files["llama.cpp"], kind, 1)
            said: dict[str, Any] = {"bits_per_weight": facts["bits_per_weight"]}
            for who, file in files.items():
                proof = certificate.certify(file, kind, questions, renderer)
                said[f"kl_{who}"], said[f"agreement_{who}"] = (
                    round(proof["divergence"], 6),
                    round(proof["agreement"], 4),
                )
            note(what="models", model="afina/tiny", format=kind, **said)


def quality(options: argparse.Namespace) -> None:
    """Ours and the peer's file of each format, dequantised by our reader, in one and the same model in fp32."""
    source = Path(options.model) if options.model else TINY
    model: Any = load_model(str(source), choose_hardware(Model(precision="fp32", device="cpu")))
    batches = _batches(source, options.tokens)
    exact = [torch.log_softmax(_logits(model, ids), -1) for ids in batches]
    plans = _plans(source)
    formats = [kind for kind in FORMATS if kind not in (*PLAIN, "q2_k_s", "mxfp4")]
    formats = options.formats.split(",") if options.formats != "q8_0,q4_k_m" else formats
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / "f32.gguf"
        write_gguf(source, plain, "f32")
        for kind in formats:
            ours, theirs = Path(place) / f"{kind}-ours.gguf", Path(place) / f"{kind}-peer.gguf"
            write_gguf(source, ours, kind)
            files = [ours]
            if options.peer:
                peer(options.peer, plain, theirs, kind, 1)
                files.append(theirs)
            found = [_quality(model, state, plans, file, batches, exact) for file in files]
            model.load_state_dict(state)
            (kl, surprise), *rest = found
            said = dict(kl_ours=float(kl.mean()), perplexity_ours=float(surprise.mean().exp()), tokens=len(kl))
            if rest:
                (kl_peer, surprise_peer), *_none = rest
                said |= dict(kl_peer=float(kl_peer.mean()), perplexity_peer=float(surprise_peer.mean().exp()))
                ratio = float(kl.mean() / kl_peer.mean())
                error = float((kl - ratio * kl_peer).std() / len(kl) ** 0.5 / kl_peer.mean())
                equal = _same_blocks(ours, theirs)
                said |= dict(kl_ratio=ratio, kl_ratio_standard_error=error, tensors_equal_to_the_byte=equal)
                said["perplexity_ratio"] = said["perplexity_ours"] / said["perplexity_peer"]
            rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in said.items()}
            note(what="quality", model=source.name, format=kind, **rounded)


def _batches(source: Path, tokens: int) -> list[torch.Tensor]:
    """Conversations of the bundled data sets as the model was trained to see them, end to end, 256 ids to a row."""
    tokenizer = load_tokenizer(str(source))
    rows = [line for path in sorted((BUNDLED / "data").rglob("*.jsonl")) for line in path.read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[int] = []
    for place in order:
        ids += tokenizer.hf.encode(tokenizer.render(json.loads(rows[place])["messages"]), add_special_tokens=False)
        if len(ids) >= tokens:
            break
    return [torch.tensor(ids[at : at + 256])[None] for at in range(0, len(ids) - 255, 256)]


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits[0].float()
    return found


def _plans(source: Path) -> list[Any]:
    from contextlib import closing

    from afina.export import gguf as writer
    from afina.export.weights import Source

    shape = read_shape(source)
    with closing(Source(source)) as tensors:
        return writer._plan_tensors(shape, tensors, "f32", source, False)


def _quality(
    model: Any,
    state: dict[str, torch.Tensor],
    plans: list[Any],
    file: Path,
    batches: list[torch.Tensor],
    exact: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(model || file) and the surprise at the next token, by position."""
    stored = GgufFile(file)
    read = dict(state)
    for plan in plans:
        values = torch.from_numpy(stored.values(plan.name).copy())
        if plan.heads:
            halves = values.reshape(plan.heads, values.shape[0] // plan.heads // 2, 2, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        read[plan.source] = values - plan.plus
        if plan.source == "model.embed_tokens.weight" and model.config.tie_word_embeddings:
            read["lm_head.weight"] = read[plan.source]
    model.load_state_dict(read)
    kls, surprises = [], []
    for ids, ours in zip(batches, exact, strict=True):
        theirs = torch.log_softmax(_logits(model, ids), -1)
        kls.append((ours.exp() * (ours - theirs)).sum(-1))
        surprises.append(-theirs[:-1].gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(kls), torch.cat(surprises)


def _same_blocks(ours: Path, theirs: Path) -> str:
    one, other = GgufFile(ours), GgufFile(theirs)
    same = sum(np.array_equal(one.raw(name), other.raw(name)) for name in one.tensors if name in other.tensors)
    return f"{same} of {len(one.tensors)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "speed", "models", "quality"))
    parser.add_argument("--ggml", help="ggml's shared library, to compare with")
    parser.add_argument("--peer", help="a Python with llama_cpp, to compare with")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--formats", default="q8_0,q4_k_m")
    parser.add_argument("--device")
    parser.add_argument("--model", help="a model folder; afina/tiny if not given")
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--place", help="where the model is laid out; the system's temporary folder if not given")
    options = parser.parse_args()
    {"errors": errors, "speed": speed, "models": models, "quality": quality}[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
