"""Encoders of few bits: their errors beside llama.cpp's, and how long a whole model takes.

    python benchmarks/quantize.py errors [--ggml LIBGGML_BASE]
    python benchmarks/quantize.py speed [--shape 1b] [--formats q8_0,q4_k_m] [--device cuda] [--peer PYTHON]
    python benchmarks/quantize.py models [--peer PYTHON]
    python benchmarks/quantize.py quality [--peer PYTHON] [--tokens 30000] [--formats q4_k_m,...]
                                     [--model FOLDER | --run RUN] [--draws 12]
    python benchmarks/quantize.py arithmetic [--formats f16,q8_0,...] [--model FOLDER | --run RUN]

LIBGGML_BASE is ggml's shared library and PYTHON an interpreter with llama_cpp, both as the llama-cpp-python source
package builds them. `errors`: root mean square, ours over llama.cpp's, block for block from the same floats. `speed`:
a random model in bf16, safetensors to GGUF, beside llama.cpp's converter to BF16 and quantiser (--converter
convert_hf_to_gguf.py, --tokenizer one that it knows). `models`: KL of each format on afina/tiny, ours and the peer's
from the same F32 file. `quality`: the same in transformers on the dequantised files, over many tokens: KL and
perplexity, ours over the peer's, with standard errors, on held-out samples of a run (else on bundled conversations) and
on what the model itself writes, averaged over orders of the model's inner dimensions; and whether the blocks are equal
to the byte. `arithmetic`: KL of a file's numbers, and of llama.cpp with them. Results are printed and appended to
results/quantize.jsonl.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from afina.artifact import versions
from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.export import certificate, quants
from afina.export.divergence import divergence
from afina.export.families import read_shape
from afina.export.gguf import write_gguf
from afina.export.mixes import FORMATS, PLAIN
from afina.export.run import held_out
from afina.gguf_file import GgufFile
from afina.model.attach import merged
from afina.model.llamacpp import LlamaCpp
from afina.model.load import choose_hardware, load_model
from afina.model.saved import save_whole
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Model
from afina.train.reopen import reopen

RESULTS = Path(__file__).parent / "results" / "quantize.jsonl"
TINY = BUNDLED / "tiny"
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "100m": (768, 2048, 12, 12, 4, 51200),
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


def lay_out(folder: Path, shape: str, tokenizer: Path = TINY) -> None:
    """A random Llama in bf16, layer by layer in shards, drawn on the GPU where there is one; with a tokenizer, as the
    peer's converter does not know that of afina/tiny."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    config |= dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, head_dim=hidden // heads
    )
    config |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary)
    config |= dict(tie_word_embeddings=shape != "8b")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    figures = read_shape(folder)
    index: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for name in figures.expected(set()):
        parts.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for part, names in parts.items():
        file = f"model-{part}.safetensors"
        tensors = {}
        for name in names:
            drawn = torch.randn(figures.size(name, vocabulary), generator=generator, device=device) * 0.02
            tensors[name] = drawn.to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")


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
    """From safetensors to GGUF: ours, and the peer's converter to BF16 with its quantiser after it. Seconds by the
    clock, and of the processor, which depend less on what else the machine does."""
    threads = len(os.sched_getaffinity(0)) if options.threads is None else options.threads
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder, plain, out = Path(place) / "model", Path(place) / "plain.gguf", Path(place) / "out.gguf"
        lay_out(folder, options.shape, Path(options.tokenizer) if options.tokenizer else TINY)
        converted = None
        if options.converter:
            command = [sys.executable, options.converter, str(folder), "--outfile", str(plain), "--outtype", "bf16"]
            environment = os.environ | {"PYTHONPATH": str(Path(options.converter).parent / "gguf-py")}
            converted = timed(
                lambda: subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=environment
                )
            )
        elif options.peer:
            write_gguf(folder, plain, "bf16")
        for kind in options.formats.split(","):
            watch = Watch()
            watch.start()
            facts: dict[str, Any] = {}
            seconds, processor = timed(
                lambda kind=kind, facts=facts: facts.update(write_gguf(folder, out, kind, device=options.device))
            )
            said = dict(seconds=seconds, processor_seconds=processor, memory_gb=round(watch.stop() / 1e9, 2))
            said |= dict(bytes=facts["bytes"], parameters=facts["parameters"], threads=threads)
            out.unlink()
            if options.peer:
                quantised = timed(lambda kind=kind: peer(options.peer, plain, out, kind, threads))
                said |= {"peer_quantiser": quantised, "peer_converter": converted}
                out.unlink()
            note(what="speed", shape=options.shape, format=kind, device=options.device or "cpu", **said)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor for this process and its children."""
    before, started = os.times(), time.perf_counter()
    work()
    spent = sum(after - earlier for after, earlier in zip(os.times()[:4], before[:4], strict=True))
    return round(time.perf_counter() - started, 1), round(spent, 1)


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
    with tempfile.TemporaryDirectory() as place:
        source, rows = _subject(options, Path(place))
        model: Any = load_model(str(source), choose_hardware(Model(precision="fp32", device="cpu")))
        texts = {"held out" if options.run else "conversations": [(ids, 1) for ids in rows]}
        texts["its own"] = _own(model, rows, options.tokens)
        exact = {
            name: [torch.log_softmax(_logits(model, ids), -1) for ids, _start in text] for name, text in texts.items()
        }
        drawn = [_drawn(source, Path(place) / f"draw-{draw}", draw) for draw in range(options.draws)]
        for kind in _formats(options):
            found: list[dict[str, Any]] = []
            equal = ""
            for folder in drawn:
                files = [folder / "ours.gguf"]
                write_gguf(folder, files[0], kind)
                if options.peer:
                    files.append(folder / "peer.gguf")
                    write_gguf(folder, folder / "f32.gguf", "f32")
                    peer(options.peer, folder / "f32.gguf", files[1], kind, 1)
                    equal = _same_blocks(*files)
                side = {name: [] for name in texts}
                plain, plans = load_file(folder / "model.safetensors"), _plans(folder)
                shaped = load_model(str(folder), choose_hardware(Model(precision="fp32", device="cpu")))
                for file in files:
                    shaped.load_state_dict(_dequantised(shaped, plain, plans, file), strict=False)
                    for name, text in texts.items():
                        side[name].append(_quality(shaped, text, exact[name]))
                found.append(side)
                for path in folder.glob("*.gguf"):
                    path.unlink()
            for name in texts:
                said = _beside([side[name] for side in found])
                if options.peer:
                    said["tensors_equal_to_the_byte"] = equal
                note(what="quality", model=options.called or source.name, text=name, format=kind, **said)


def _drawn(source: Path, out: Path, draw: int) -> Path:
    """The same model with its inner dimensions in another order, draw 0 as it is: other weights share a block, so that
    rounding errs in another way. One model's errors of rounding are one throw of dice, however many tokens are read:
    five-bit files of one model were 35% nearer to it than the peer's on one text, and equally near on another."""
    shutil.copytree(source, out)
    if not draw:
        return out
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text("utf-8"))
    generator = torch.Generator().manual_seed(draw)

    def order(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    hidden, width = order(config["hidden_size"]), config["head_dim"]
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        inner = order(config["intermediate_size"])
        values = torch.stack([head * width + order(width) for head in range(config["num_key_value_heads"])])
        outputs = torch.stack([values[head // shared] % width + head * width for head in range(shared * len(values))])
        for name, side, by in (
            ("mlp.gate_proj", 0, inner),
            ("mlp.up_proj", 0, inner),
            ("mlp.down_proj", 1, inner),
            ("self_attn.v_proj", 0, values.flatten()),
            ("self_attn.o_proj", 1, outputs.flatten()),
        ):
            tensors[f"{at}{name}.weight"] = tensors[f"{at}{name}.weight"].index_select(side, by)
    for name, tensor in tensors.items():
        first = name.endswith(("o_proj.weight", "down_proj.weight")) or tensor.ndim == 1
        tensors[name] = tensor.index_select(0 if first else 1, hidden).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _subject(options: argparse.Namespace, place: Path) -> tuple[Path, list[torch.Tensor]]:
    """The model's folder, and rows of ids: of a run the held-out samples, else conversations of the bundled sets."""
    if options.run is None:
        source = Path(options.model) if options.model else TINY
        return source, _batches(source, options.tokens)
    tuned = reopen(Path(options.run), "fp32")
    save_whole(merged(tuned.model), place / "model")
    tuned.renderer.tokenizer.save(place / "model")
    ids = np.concatenate([row.ids for row in tuned.renderer.samples(held_out(tuned)[: options.tokens // 16])])
    return place / "model", [torch.from_numpy(row)[None].long() for row in np.array_split(ids, len(ids) // 256)][
        : options.tokens // 256
    ]


def _formats(options: argparse.Namespace) -> list[str]:
    if options.formats != "q8_0,q4_k_m":
        return list(options.formats.split(","))
    return [kind for kind in FORMATS if kind not in (*PLAIN, "q2_k_s", "mxfp4")]


def _beside(draws: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> dict[str, Any]:
    """Means over all positions and draws; ours over the peer's, with the standard error over draws (over positions
    where there is one draw)."""
    sides = [torch.stack([torch.stack(draw[side]) for draw in draws]) for side in range(len(draws[0]))]
    kl, surprise = sides[0].unbind(1)  # (draws, positions)
    said = {"tokens": kl.shape[1], "draws": len(draws), "kl_ours": kl.mean(), "perplexity_ours": surprise.mean().exp()}
    for other in sides[1:]:
        kl_peer, surprise_peer = other.unbind(1)
        ratio, moved = kl.mean() / kl_peer.mean(), surprise - surprise_peer
        said |= {"kl_peer": kl_peer.mean(), "perplexity_peer": surprise_peer.mean().exp()}
        said |= {"kl_ratio": ratio, "kl_ratio_error": _error(kl - ratio * kl_peer) / kl_peer.mean()}
        said |= {"perplexity_ratio": moved.mean().exp(), "perplexity_ratio_error": _error(moved)}
    return {key: value if isinstance(value, int) else round(float(value), 6) for key, value in said.items()}


def _error(values: torch.Tensor) -> torch.Tensor:
    """The standard error of the mean of (draws, positions)."""
    each = values.mean(1) if len(values) > 1 else values[0]
    return each.std() / len(each) ** 0.5


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


def _own(model: Any, rows: list[torch.Tensor], tokens: int, given: int = 16) -> list[tuple[torch.Tensor, int]]:
    """What the model itself writes after the first ids of the rows, drawn from its whole distribution.

    Of a text that the model writes, the mean surprise at a file's predictions is the entropy plus the divergence: it
    cannot fall by rounding, and moves as the divergence does. On texts that a model knows badly rounding moves
    it either way, by far more than the divergence, and not the same way twice.
    """
    torch.manual_seed(0)
    starts = torch.cat([row[:, :given] for row in rows])[: tokens // (256 - given)]
    drawn = model.generate(
        starts, attention_mask=torch.ones_like(starts), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        max_new_tokens=256 - given, min_new_tokens=256 - given, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [(row[None], given) for row in drawn]


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


def _dequantised(model: Any, state: dict[str, torch.Tensor], plans: list[Any], file: Path) -> dict[str, torch.Tensor]:
    """The model's tensors as a reader of the file sees them."""
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
    return read


def _quality(
    model: Any, text: list[tuple[torch.Tensor, int]], exact: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(model || file) and the surprise at the next token, by position, of each row from its start on."""
    kls, surprises = [], []
    for (ids, start), ours in zip(text, exact, strict=True):
        theirs = torch.log_softmax(_logits(model, ids), -1)[start - 1 : -1]
        ours = ours[start - 1 : -1]
        kls.append((ours.exp() * (ours - theirs)).sum(-1))
        surprises.append(-theirs.gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(kls), torch.cat(surprises)


def arithmetic(options: argparse.Namespace) -> None:
    """What of a file's divergence is its numbers, and what llama.cpp's way of multiplying with them: it quantises the
    inputs of products too. The same positions, by transformers with the dequantised file and by llama.cpp."""
    with tempfile.TemporaryDirectory() as place:
        source, rows = _subject(options, Path(place))
        model: Any = load_model(str(source), choose_hardware(Model(precision="fp32", device="cpu")))
        exact = [torch.log_softmax(_logits(model, ids), -1) for ids in rows]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for kind in options.formats.split(","):
            file = Path(place) / f"{kind}.gguf"
            write_gguf(source, file, kind)
            model.load_state_dict(_dequantised(model, state, _plans(source), file))
            numbers, _surprise = _quality(model, [(ids, 1) for ids in rows], exact)
            asked: list[float] = []
            with LlamaCpp(file, context=512, cache="f32") as witness:
                for ids, ours in zip(rows, exact, strict=True):
                    told = witness.logprobs(ids[0, :-1].tolist(), top=512)
                    asked += [divergence(*pair) for pair in zip(ours[:-1].numpy(), told, strict=True)]
            note(
                what="arithmetic",
                model=options.called or source.name,
                format=kind,
                tokens=len(asked),
                kl_of_the_numbers=round(float(numbers.mean()), 6),
                kl_in_llamacpp=round(float(np.mean(asked)), 6),
            )


def _same_blocks(ours: Path, theirs: Path) -> str:
    one, other = GgufFile(ours), GgufFile(theirs)
    same = sum(np.array_equal(one.raw(name), other.raw(name)) for name in one.tensors if name in other.tensors)
    return f"{same} of {len(one.tensors)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "speed", "models", "quality", "arithmetic"))
    parser.add_argument("--ggml", help="ggml's shared library, to compare with")
    parser.add_argument("--peer", help="a Python with llama_cpp, to compare with")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py, to compare with")
    parser.add_argument(
        "--tokenizer", help="a folder with the tokenizer of the laid out model; afina/tiny's if not given"
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--formats", default="q8_0,q4_k_m")
    parser.add_argument("--device")
    parser.add_argument("--model", help="a model folder; afina/tiny if not given")
    parser.add_argument("--run", help="a finished run, to measure the tuned model")
    parser.add_argument("--called", help="what the results call the model")
    parser.add_argument("--draws", type=int, default=1, help="orders of the model's inner dimensions")
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--place", help="where the model is laid out; the system's temporary folder if not given")
    options = parser.parse_args()
    jobs = {"errors": errors, "speed": speed, "models": models, "quality": quality, "arithmetic": arithmetic}
    jobs[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
