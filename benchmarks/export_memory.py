"""What an export takes of memory, step by step, for a model of a given shape: merge, its proof, a GGUF file.

    python benchmarks/export_memory.py [--shape 1b] [--quantization nf4] [--format q4_k_m] [--device cpu]
                                           [--prompts 16] [--tokens 32]

A random Llama in bf16 is laid out with a random adapter (LoRA r16 on every linear layer), and taken through what
`afina export` does but for llama.cpp: opened, asked prompts, merged in bf16 from file to file (or, of a quantised
base, a layer at a time), the merged model asked the same, written as GGUF. For each step: seconds, and the most memory
of our own (pages of files, which the system may drop, apart). Printed, and appended to results/quantize.jsonl.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from quantize import SHAPES, TINY, Watch, lay_out, note

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.export.certificate import pose
from afina.export.folding import can_fold, fold, read_adapter
from afina.export.gguf import write_gguf
from afina.export.merge import apart
from afina.export.merging import expected_changes, prove_merge
from afina.export.weights import Held, Source
from afina.model.load import Hardware, load_model
from afina.model.saved import load_adapter, save_configuration
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Model


def adapter_for(folder: Path, base: Path, rank: int = 16) -> Path:
    """A random adapter in PEFT's format: `folder`."""
    from safetensors.torch import save_file

    folder.mkdir()
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}), "utf-8")
    generator, tensors = torch.Generator().manual_seed(1), {}
    with closing(Source(base)) as source:
        for name in sorted(source.names()):
            module = name.removesuffix(".weight")
            if module.endswith(targets):
                rows, columns = source.stored_shape(name)
                for side, size in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                    tensors[f"base_model.model.{module}.{side}.weight"] = torch.randn(size, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--format", default="q4_k_m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--place", help="where the model is laid out; the system's temporary folder if not given")
    options = parser.parse_args()
    hardware = Hardware(torch.device(options.device), torch.float32)
    wanted = Model(quantization=options.quantization, precision="bf16", device=options.device)
    steps: dict[str, list[float]] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        watch, started = Watch(), time.perf_counter()
        watch.start()
        yield
        steps[name] = [round(time.perf_counter() - started, 1), round(watch.stop() / 1e9, 2)]
        print(name, *steps[name], flush=True)

    with tempfile.TemporaryDirectory(dir=options.place) as place:
        base, merged = Path(place) / "base", Path(place) / "merged"
        lay_out(base, options.shape)
        adapter = adapter_for(Path(place) / "adapter", base)
        renderer = Renderer(load_tokenizer(str(TINY)))
        lines = (BUNDLED / "data" / "sentiment" / "test.jsonl").read_text("utf-8").splitlines()[: options.prompts]
        asked = [json.loads(line)["messages"][:-1] for line in lines]
        samples = [
            Sample((*(Message(turn["role"], turn["content"]) for turn in turns), Message("assistant", "x")), TINY, 1)
            for turns in asked
        ]
        with step("opened"):
            model = load_adapter(load_model(str(base), hardware, wanted, held=True), adapter)
        with step("asked"):
            questions = pose(model, renderer, samples, options.tokens)
        with step("changes counted"):
            changes = expected_changes(model)
        with step("merged"):
            merged.mkdir()
            source = Held(model) if options.quantization != "none" else Source(base)
            terms = read_adapter(adapter)
            assert terms is not None and can_fold(source, terms)
            with closing(source):
                fold(source, terms, merged, torch.bfloat16)
            save_configuration(model, merged, torch.bfloat16)
            renderer.tokenizer.save(merged)
        del model
        with step("merged model asked"):
            away, _largest = apart(load_model(str(merged), hardware, held=True), questions)
        with step("merge proved"):
            prove_merge(changes, adapter / "adapter_model.safetensors", merged, torch.bfloat16)
        with step("written"):
            gpu = None if options.device == "cpu" else options.device
            facts = write_gguf(merged, Path(place) / "out.gguf", options.format, device=gpu)
        note(
            what="export",
            shape=options.shape,
            base_in=options.quantization,
            format=options.format,
            device=options.device if options.device == "cpu" else torch.cuda.get_device_name(),
            threads=torch.get_num_threads(),
            prompts=options.prompts,
            tokens=options.tokens,
            parameters=facts["parameters"],
            divergence=float(f"{away:.3g}"),
            seconds_and_gb=steps,
            most_gb=max(most for _seconds, most in steps.values()),
            gpu_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if options.device != "cpu" else None,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
