"""Samples a second of an evaluation, beside transformers' own generate on the same prompts, printed side by side.

    python benchmarks/evaluate.py                 the bundled base, 500 bundled prompts, two cores
    python benchmarks/evaluate.py --gpu           1B's shape with random weights, 1,000 prompts of GSM8K's lengths, 128
                                                  new tokens, beside transformers' batched generate

Appends a line to benchmarks/results/evaluate.jsonl. What both write is compared: equal ids, or the figure is void.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from provenance import commit
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from afina.data.load_tokenizer import load_tokenizer
from afina.data.read import read
from afina.data.template import Renderer
from afina.model.decode import Continuation, write_all
from afina.model.load import Hardware, load_model
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Data

RESULTS = Path(__file__).parent / "results" / "evaluate.jsonl"
LLAMA_1B = {
    **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192},
    **{"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
"""Llama 3.2 1B."""

Written = list[list[int]]


def ours(model: Any, prompts: Written, new: int, ends: tuple[int, ...]) -> Written:
    """As `afina eval` asks."""
    found: dict[int, Continuation] = {}
    write_all(model, prompts, end_ids=ends, pad_id=0, max_new_tokens=new, on_answer=found.__setitem__)
    return [found[place].ids for place in range(len(prompts))]


def theirs(model: Any, prompts: Written, new: int, ends: tuple[int, ...], at_once: int) -> Written:
    """transformers' generate, `at_once` prompts of like length at a time, padded on the left."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=list(ends) or None, pad_token_id=0, use_cache=True
    )
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    found: dict[int, list[int]] = {}
    device = next(model.parameters()).device
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        width = max(len(prompts[place]) for place in group)
        ids = torch.zeros((len(group), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(group):
            ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
            mask[row, width - len(prompts[place]) :] = 1
        with torch.inference_mode():
            output = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        for row, place in enumerate(group):
            tail = output[row, width:].tolist()
            found[place] = next((tail[:at] for at, index in enumerate(tail) if index in ends), tail)
    return [found[place] for place in range(len(prompts))]


def measured(write: Callable[[], Written], device: torch.device) -> tuple[Written, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = write()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def bundled_prompts(count: int, renderer: Renderer) -> Written:
    """Prompts of the bundled sets, in turn, so that they differ in length and kind."""
    names = ("sentiment", "support-chat", "maths-tutor", "python-tutor", "algorithms-tutor", "bot-configurator")
    samples = []
    for name in names:
        samples += read(f"afina/{name}/train", Data(train="-"), Path()).samples
    chosen = random.Random(0).sample(samples, count)
    return [renderer.prompt(sample.prompt) for sample in chosen]


def gsm8k_lengths(count: int) -> list[int]:
    """Lengths like GSM8K's questions under Llama's tokenizer and template: 60 to 300 tokens, most around 110."""
    dice = random.Random(0)
    return [min(300, max(60, int(dice.lognormvariate(4.7, 0.35)))) for _number in range(count)]


def record(**facts: Any) -> None:
    line = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.machine(),
        **facts,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def report(name: str, count: int, tokens: int, seconds: dict[str, float], equal: int, **facts: Any) -> None:
    for who, spent in seconds.items():
        print(f"{who:28} {spent:8.2f} s  {count / spent:8.1f} samples/s  {tokens / spent:10,.0f} tokens/s")
    first, *others = seconds
    for other in others:
        print(f"{first} is {seconds[other] / seconds[first]:.2f} times as fast as {other}")
    print(f"equal answers: {equal} of {count}")
    record(what=name, samples=count, tokens=tokens, seconds=seconds, equal=equal, **facts)


def on_cpu(count: int, new: int) -> None:
    hardware = Hardware(torch.device("cpu"), torch.float32)
    source = str(BUNDLED / "tiny")
    model, renderer = load_model(source, hardware), Renderer(load_tokenizer(source))
    prompts, ends = bundled_prompts(count, renderer), renderer.tokenizer.end_ids
    ours(model, prompts[:8], 4, ends)
    theirs(model, prompts[:2], 4, ends, 1)
    mine, fast = measured(lambda: ours(model, prompts, new, ends), hardware.device)
    plain, slow = measured(lambda: theirs(model, prompts, new, ends, 1), hardware.device)
    equal = sum(one == two for one, two in zip(mine, plain, strict=True))
    seconds = {"afina": fast, "generate, one by one": slow}
    tokens = sum(map(len, mine))
    report("bundled base, bundled prompts", count, tokens, seconds, equal, new=new, threads=torch.get_num_threads())


def on_gpu(count: int, new: int, at_once_of_theirs: list[int]) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    with device:
        config = LlamaConfig(**LLAMA_1B, attn_implementation="sdpa")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # all write all their tokens
    dice = random.Random(1)
    prompts = [[dice.randrange(3, 128_000) for _token in range(length)] for length in gsm8k_lengths(count)]
    seconds, found = {}, {}
    ours(model, prompts[:8], 4, ())
    for name, at_once in (("afina", 0), *((f"generate, {many} at once", many) for many in at_once_of_theirs)):
        write = (
            (lambda: ours(model, prompts, new, ()))
            if not at_once
            else (lambda at_once=at_once: theirs(model, prompts, new, (), at_once))
        )
        found[name], seconds[name] = measured(write, device)
        print(f"{name}: {seconds[name]:.2f} s", flush=True)
    first = found["afina"]
    # In bf16 two batchings round differently, and greedy answers part where two tokens are nearly as likely.
    same = sum(one[:8] == two[:8] for one, two in zip(first, list(found.values())[1], strict=True))
    tokens = sum(map(len, first))
    gpu = torch.cuda.get_device_name(device)
    peak = torch.cuda.max_memory_allocated(device)
    report("1B, random weights", count, tokens, seconds, same, new=new, gpu=gpu, peak_bytes=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--new", type=int, default=0)
    parser.add_argument("--at-once", type=int, nargs="+", default=[512, 256], help="prompts of transformers' batches")
    given = parser.parse_args()
    if given.gpu:
        on_gpu(given.samples or 1000, given.new or 128, given.at_once)
    else:
        on_cpu(given.samples or 500, given.new or 48)


if __name__ == "__main__":
    main()
