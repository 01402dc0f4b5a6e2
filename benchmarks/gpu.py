"""Training speed and memory on one GPU: ours and whichever peers are installed, on the same random models and tokens.

    make bench-gpu                                                         everything, beside the peers that are here
    python benchmarks/gpu.py W1 W10 --tools afina,unsloth                  one process a case; lines go to results
    python benchmarks/gpu.py W1 W3 --side-by-side --steps 2,4              packages imported at once, GPU used in turns
    python benchmarks/gpu.py --case '{"workload": "W1", "tool": "afina"}'  one case in this process

Weights have the shapes of real models and random values; every token is learnt; three steps warm up, six are timed
and the median counts. Memory is what tensors held at most (max_memory_allocated).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")
HERE = Path(__file__).parent
LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
)  # fmt: skip
LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True,
)  # fmt: skip
PHI_2 = dict(
    hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=51200,
    max_position_embeddings=2048, partial_rotary_factor=0.4,
)  # fmt: skip
GPT_OSS_20B = dict(
    hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8,
    head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
)  # fmt: skip
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": dict(shape=LLAMA_8B, samples=4, length=2048, gib=36.0, goal=18700),
    "W1+": dict(shape=LLAMA_8B, samples=4, length=2048, gib=45.9, goal=0),
    "W10": dict(shape=LLAMA_8B, samples=2, length=4096, gib=36.0, goal=17200),
    "W2": dict(shape=LLAMA_8B, samples=4, length=2048, eight="fp8", gib=36.0, goal=27000),
    "W2i": dict(shape=LLAMA_8B, samples=4, length=2048, eight="int8", gib=36.0, goal=0),
    "W3e": dict(shape=LLAMA_8B, samples=4, length=2048, four_bits=True, eight="fp8", hold=False, gib=30.0, goal=25000),
    "W3": dict(shape=LLAMA_8B, samples=4, length=2048, four_bits=True, gib=30.0, goal=18000),
    "W4": dict(shape=LLAMA_8B, samples=1, length=2048, four_bits=True, gib=5.0, goal=7500),
    "W5": dict(shape=LLAMA_8B, samples=4, length=2048, gib=17.7, goal=14000),
    "W6": dict(shape=LLAMA_8B, samples=1, length=65536, four_bits=True, gib=12.0, goal=5500, steps=(1, 1)),
    "W7": dict(shape=LLAMA_1B, samples=8, length=2048, full=True, gib=20.0, goal=75000),
    "W7+": dict(shape=LLAMA_1B, samples=8, length=2048, full=True, gib=26.8, goal=0),
    "W8": dict(shape=PHI_2, samples=1, length=2048, four_bits=True, gib=2.4, goal=15000),
    "W9": dict(shape=GPT_OSS_20B, samples=2, length=2048, packed=True, gib=40.0, goal=18000),
    "W9-bf16": dict(shape=GPT_OSS_20B, samples=2, length=2048, gib=48.0, goal=0),
    "W9-fp8": dict(shape=GPT_OSS_20B, samples=2, length=2048, eight="fp8", gib=40.0, goal=0),
    "W9-least": dict(shape=GPT_OSS_20B, samples=1, length=2048, packed=True, gib=13.0, goal=0),
    "W9-experts": dict(shape=GPT_OSS_20B, samples=2, length=2048, packed=True, experts=True, gib=40.0, goal=0),
    "W9-short": dict(
        shape=GPT_OSS_20B, samples=1, length=8192, packed=True, experts=True, short=True, gib=40.0, goal=0
    ),
    "S1": dict(shape=LLAMA_1B, samples=8, length=2048, gib=16.0, goal=0),
}
"""shape, samples a micro-batch and tokens each; the memory and the tokens/s to reach (docs/log.md says why).

packed: experts in MXFP4, as published, and unpacked where there is room; peers read the same shape in bf16. experts:
adapters on every expert and router too. short: the tokens are samples of GSM8K's lengths, packed.
"""
STEPS = 3, 6
"""To warm up, and timed."""
WARM = 6.0
"""Seconds after which a card draws what its limit lets it."""


def case(workload: str, tool: str, **options: Any) -> dict[str, Any]:
    import torch

    work = WORKLOADS[workload]
    if "layers" in options:  # to look at a few of them
        work = work | dict(shape=work["shape"] | dict(num_hidden_layers=options["layers"]))
    if "turn" in options:  # several may import side by side; one at a time has the GPU
        wait_for(options.pop("turn"), tool)
    if tool == "floor":
        return floor(workload, work)
    if tool == "afina":
        step, parameters, about = afina_step(work, options)
    else:
        from peer_gpu import peer_step

        step, parameters, about = peer_step(workload, work, tool, Path(options.pop("folder")))
    optimizer, clip = optimiser_of(tool, parameters, options.get("adamw", "ours"))
    vocabulary = work["shape"]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    shape = (work["samples"], work["length"])
    tokens = [torch.randint(5, vocabulary - 1, shape, generator=generator).cuda() for _ in range(4)]
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    warm_up, timed_steps = work.get("steps") or options.get("steps", STEPS)

    def whole(turn: int = 0) -> tuple[Any, Any]:
        loss = step(tokens[turn % 4])
        loss.backward()
        norm = clip(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, norm

    for turn in range(warm_up + timed_steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss, norm = whole(turn)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(round(loss.item(), 4))
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"step {turn + 1}: {seconds[-1]:.3f} s, {peak:.2f} GiB, loss {losses[-1]}", file=sys.stderr, flush=True)
        if turn == 0:
            first = time.perf_counter() - STARTED
        if not norm.item() > 0:
            raise SystemExit("no gradient")
    timed = sorted(seconds[warm_up:])
    median = timed[len(timed) // 2]
    result = dict(
        workload=workload, tool=tool, tokens_per_second=round(shape[0] * shape[1] / median),
        step_ms=[round(1000 * value, 1) for value in timed],
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        first_step_s=round(first, 1), losses=losses, gpu=torch.cuda.get_device_name(), **about,
    )  # fmt: skip
    if options.get("profile"):
        profile(whole)
    if options.get("python"):
        import cProfile
        import pstats

        with cProfile.Profile() as spent:
            whole()
            torch.cuda.synchronize()
        pstats.Stats(spent).sort_stats("tottime").print_stats(28)
    return result


def optimiser_of(tool: str, parameters: list[Any], which: str) -> tuple[Any, Any]:
    """As `afina train` steps and clips, or (`torch`) as PyTorch does, and peers with it."""
    import torch

    if tool != "afina" or which == "torch":
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
        return optimizer, lambda limit: torch.nn.utils.clip_grad_norm_(parameters, limit)
    from afina.recipe.schema import Training
    from afina.train.optimizer import clip, make_optimizer

    learning = {str(place): one for place, one in enumerate(parameters)}
    optimizer = make_optimizer(learning, Training(learning_rate=2e-4, weight_decay=0.01))
    return optimizer, lambda limit: clip(optimizer, learning, limit)


def wait_for(turn: str, tool: str) -> None:
    """Import what takes long, then hold a file's lock until this process ends; the wait counts for nothing."""
    import fcntl

    if tool == "unsloth":
        import unsloth  # noqa: F401
    elif tool != "floor":
        import afina.engine.engine
        import afina.model.attach  # noqa: F401

    global STARTED
    began = time.perf_counter()
    fcntl.flock(os.open(turn, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
    STARTED += time.perf_counter() - began


def empty_model(shape: dict[str, Any]) -> Any:
    """Of meta tensors."""
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PhiConfig

    kind = PhiConfig if shape is PHI_2 else GptOssConfig if shape is GPT_OSS_20B else LlamaConfig
    config = kind(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    attention = "eager" if shape is GPT_OSS_20B else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model


def random_model(shape: dict[str, Any], packed: bool = False) -> Any:
    """packed: experts in MXFP4, as gpt-oss is published."""
    import torch

    from afina.model.mxfp4 import pack_experts

    model = empty_model(shape)
    if packed:
        with torch.device("meta"):
            pack_experts(model)
    model.to_empty(device="cuda").tie_weights()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("_blocks"):
                value.random_(0, 256, generator=generator)
            elif name.endswith("_scales"):
                value.random_(117, 121, generator=generator)
        for name, value in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                value.fill_(1.0)
            elif name.endswith("bias"):
                value.zero_()
            else:
                value.normal_(0, 0.02, generator=generator)
    # buffers that depend on the configuration, not on the weights, are lost with the meta device
    rotary = type(model.model.rotary_emb)(config=model.config, device="cuda")
    model.model.rotary_emb = rotary
    return model


def into_four_bits(model: Any) -> Any:
    """Every linear layer but the head as bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes
    import torch

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    four = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=linear.bias is not None,
                        compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta",
                    )  # fmt: skip
                    four.bias = linear.bias
                    four.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                    ).to("cuda")
                    setattr(part, name, four)
    torch.cuda.empty_cache()
    return model


def learner(work: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model with what learns in it, and the parameters that do."""
    from afina.model.attach import attach, learning
    from afina.recipe.schema import Lora

    base = random_model(work["shape"], work.get("packed", False))
    if work.get("full"):  # in bf16 throughout, as the peers do it
        return base.requires_grad_(True).train(), list(base.parameters())
    if work.get("four_bits"):
        into_four_bits(base).requires_grad_(False)
    mixed = bool(work.get("experts"))
    model = attach(base, Lora(rank=16, alpha=16.0, experts=mixed, router=mixed), seed=3407).train()
    return model, [parameter for _name, parameter in learning(model)]


def afina_step(work: dict[str, Any], options: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The engine as `afina train` would plan it for a GPU with the memory that is to be reached."""
    import torch

    from afina.data.batch import Batch
    from afina.engine import products
    from afina.engine.eight import FP8, INT8
    from afina.engine.eight_gate import into_eight_bits
    from afina.engine.engine import Engine
    from afina.engine.plan import Plan, choose, count_up, ladder, measure, spread

    products.ALIGN["cuda"] = options.get("align", products.ALIGN["cuda"])
    model, parameters = learner(work)
    engine = Engine(model, torch.bfloat16)
    if work.get("eight"):
        form = {"fp8": FP8, "int8": INT8}[work["eight"]]
        into_eight_bits(engine, form, hold=options.get("hold", work.get("hold", True)))
    torch.cuda.empty_cache()
    count = work["samples"] * work["length"]
    lengths = like_gsm8k(count) if work.get("short") else (work["length"],) * work["samples"]
    longest = max(lengths)
    learning_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    standing = torch.cuda.memory_allocated() + 2 * learning_bytes  # AdamW's two moments are still to come
    free = int((options.get("gib", work["gib"])) * 2**30) - standing
    rates = measure(engine)
    plan = choose(engine, count, count, free, rates, longest)
    if "levels" in options:  # how many layers stand on each rung of the ladder
        rungs = ladder(frozenset(engine.blocks[0].saves(1)))
        placements = spread(rungs, options["levels"])
        plan = count_up(engine, Plan(count, placements, host=options.get("host", "neither")), rates, longest)
    rows = options.get("rows", plan.rows_at_once)
    engine.place(plan.placements, rows_at_once=rows, host=plan.host, held=options.get("held", plan.held))
    names = ["+".join(sorted(p.away)) + "/" + "+".join(sorted(p.again)) for p in plan.placements]
    about = {
        "placements": {name: names.count(name) for name in dict.fromkeys(names)}, "host": plan.host, "rows": rows,
        "held": options.get("held", plan.held), "planned_gib": round((standing + plan.bytes) / 2**30, 2),
        "planned_ms": round(plan.microseconds / 1000, 1), "standing_gib": round(standing / 2**30, 2),
    }  # fmt: skip

    positions = torch.cat([torch.arange(part, device="cuda") for part in lengths])
    predicting = (positions.roll(-1) > 0).nonzero().flatten()  # all but the last of each sample

    def step(ids: Any) -> Any:
        batch = Batch(
            input_ids=ids.view(1, -1), position_ids=positions[None], attention_mask=None, lengths=lengths,
            predicting=predicting, targets=ids.flatten()[predicting + 1], owner=predicting,
            samples=tuple(range(len(lengths))), tokens=count,
        )  # fmt: skip
        return engine.summed_loss(model, batch) / predicting.numel()

    return step, parameters, {"engine": "fused", **about, **options}


def like_gsm8k(tokens: int) -> tuple[int, ...]:
    """Lengths of samples that fill so many tokens, 161 on average."""
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(round(draw.lognormvariate(5.0, 0.4)), tokens - sum(lengths)))
    return tuple(lengths)


def floor(workload: str, work: dict[str, Any]) -> dict[str, Any]:
    """What no implementation avoids: the products of base and head, forward and backward, in bf16, and attention.

    Each alone and cool; and `warm`, one after the other as in a step, for as long as a card needs to come to its limit.
    """
    import torch
    from torch.nn import functional as F

    shape, rows = work["shape"], work["samples"] * work["length"]
    hidden, wide, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv_heads = shape.get("num_key_value_heads", heads)
    width = shape.get("head_dim", hidden // heads)
    columns = (heads + 2 * kv_heads) * width
    mlp = [(columns + wide, hidden), (hidden, wide)] if shape is PHI_2 else [(2 * wide, hidden), (hidden, wide)]
    products = [*([] if shape is PHI_2 else [(columns, hidden)]), (hidden, heads * width)]
    each = shape.get("num_experts_per_tok", 1)  # a mixture's rows, as if all went to one expert
    layers = shape["num_hidden_layers"]
    attending = layers // 2 if shape is GPT_OSS_20B else layers  # half of gpt-oss's have short windows

    def of(n: int, k: int, rows: int = rows) -> list[Any]:
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
        calls = [lambda: torch.mm(x, weight.t()), lambda: torch.mm(dy, weight)]
        return [*calls, lambda: torch.mm(dy.t(), x)] if work.get("full") else calls

    q, k, v = (
        torch.randn(work["samples"], count, work["length"], width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )

    def attend() -> None:
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION]):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(torch.ones_like(q))

    def seconds(calls: list[Any], lasting: float = 0.0) -> float:
        """Of all the calls one after the other, ten times, once they have gone on for so long."""
        began = time.perf_counter()
        for turn in range(1_000_000):
            if turn >= 3 and time.perf_counter() - began > lasting:
                break
            for call in calls:
                call()
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _turn in range(10):
            for call in calls:
                call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / 10

    layer = [call for product in products for call in of(*product)]
    layer += [call for product in mlp for call in of(*product, each * rows)]
    head = of(shape["vocab_size"], hidden)
    of_products = layers * sum(seconds([call]) for call in layer) + sum(seconds([call]) for call in head)
    of_attention = attending * seconds([attend])
    query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader", "-lms", "500"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watching:
        warm = seconds([*layer * layers, *[attend] * attending, *head], lasting=WARM)
        watching.terminate()
        drawn = watching.communicate()[0].split("\n")[-2:][0]  # the last whole line
    result = dict(
        workload=workload, tool="floor", engine="floor", tokens_per_second=round(rows / (of_products + of_attention)),
        products_ms=round(1000 * of_products, 1), attention_ms=round(1000 * of_attention, 1),
        warm_tokens_per_second=round(rows / warm), warm_ms=round(1000 * warm, 1), drawn=drawn,
    )  # fmt: skip
    return result | dict(peak_gib=0.0, first_step_s=0.0, losses=[], gpu=torch.cuda.get_device_name())


def profile(step: Any) -> None:
    """Where a step's time goes: kernels by name, and when the GPU waited for the next one."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    by_name: dict[str, list[float]] = {}
    gaps: list[tuple[float, float, str]] = []
    end = events[0].time_range.start
    began, idle = end, 0.0
    for event in events:
        by_name.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
        if event.time_range.start > end:
            idle += event.time_range.start - end
            gaps.append((event.time_range.start - end, (end - began) / 1000, event.name[:60]))
        end = max(end, event.time_range.end)
    print(f"span {(end - began) / 1000:.1f} ms, idle {idle / 1000:.1f} ms, {len(events)} kernels and copies")
    for name, spent in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"{sum(spent) / 1000:9.2f} ms {len(spent):5} x {sum(spent) / len(spent):9.1f} us  {name}")
    for gap, at, name in sorted(gaps, reverse=True)[:12]:
        print(f"waited {gap:8.0f} us at {at:7.1f} ms for {name}")


def here(tool: str, peers: list[str]) -> bool:
    """Whether a tool is installed, or lies in one of the peers' folders."""
    from importlib.machinery import PathFinder

    needs = {"unsloth": "unsloth", "liger": "liger_kernel"}
    return tool not in needs or PathFinder.find_spec(needs[tool], [*sys.path, *peers]) is not None


def begin(workload: str, tool: str, folder: Path, said: Path, peers: list[str], **more: Any) -> subprocess.Popen[str]:
    """A case in a process of its own, so that memory and first step are its own. It writes what it says into `said`."""
    description = {"workload": workload, "tool": tool} | ({} if tool in ("afina", "floor") else {"folder": str(folder)})
    command = [sys.executable, str(Path(__file__)), "--case", json.dumps(description | more)]
    environment = os.environ | {"UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if tool not in ("afina", "floor"):
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *peers])
    with said.open("w", encoding="utf-8") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment)


def found_in(said: Path) -> dict[str, Any] | None:
    """The result of a case that has ended."""
    lines = said.read_text("utf-8", errors="replace").split("\n")
    line = next((text for text in lines if text.startswith("RESULT ")), None)
    if line is None:
        print(f"{said.stem} failed:", *lines[-20:], sep="\n", flush=True)
        return None
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("workloads", nargs="*")
    options.add_argument("--tools", default="floor,afina,unsloth,liger,transformers")
    options.add_argument("--case")
    options.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "afina-bench-models")
    options.add_argument("--peers", type=Path, action="append", default=[], help="a folder of packages for peers alone")
    options.add_argument("--results", type=Path, default=HERE / "results" / "gpu.jsonl")
    options.add_argument("--steps", help="to warm up, and timed, but for W6: 2,4")
    options.add_argument("--side-by-side", action="store_true", help="import at once, then have the GPU in turns")
    chosen = options.parse_args()
    if chosen.case:
        print("RESULT " + json.dumps(case(**json.loads(chosen.case))), flush=True)
        return
    peers = [str(folder.resolve()) for folder in chosen.peers]
    tools, more = [tool for tool in chosen.tools.split(",") if here(tool, peers)], {}
    if chosen.steps:
        more["steps"] = [int(count) for count in chosen.steps.split(",")]
    workloads = chosen.workloads or [name for name in WORKLOADS if WORKLOADS[name]["goal"]]
    folders = {name: chosen.models / "{hidden_size}x{num_hidden_layers}".format(**WORKLOADS[name]["shape"])
               for name in workloads}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if chosen.side_by_side:
            more["turn"] = str(place / "turn")
        waiting = []
        # what needs no weights from a disk first: they are written meanwhile
        for workload, tool in sorted(product(workloads, tools), key=lambda pair: pair[1] not in ("floor", "afina")):
            folder, said = folders[workload], place / f"{workload}-{tool}.txt"
            if tool not in ("afina", "floor") and not (folder / "tokenizer_config.json").is_file():
                write_model(WORKLOADS[workload]["shape"], folder, more.get("turn", str(place / "nobody")))
            waiting.append((workload, tool, begin(workload, tool, folder, said, peers, **more), said))
            if not chosen.side_by_side:
                record(*waiting.pop(), chosen.results, chosen.steps)
        while waiting:
            for one in [one for one in waiting if one[2].poll() is not None]:
                waiting.remove(one)
                record(*one, chosen.results, chosen.steps)
            time.sleep(0.2)


def record(
    workload: str, tool: str, process: subprocess.Popen[str], said: Path, results: Path, steps: str | None
) -> None:
    """Wait for a case and append its result."""
    from provenance import commit

    from afina.artifact import versions

    process.wait()
    result = found_in(said)
    if result is None:
        return
    said_steps = f" --steps {steps}" if steps and "steps" not in WORKLOADS[workload] else ""
    result |= dict(
        command=f"python benchmarks/gpu.py {workload} --tools {tool}{said_steps}",
        commit=commit(), versions=versions(), date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{workload:4} {tool:12} {result['tokens_per_second']:7,} tokens/s {result['peak_gib']:6.2f} GiB "
          f"first step {result['first_step_s']:5.1f} s  {result['losses'][:3]}", flush=True)  # fmt: skip


def write_model(shape: dict[str, Any], folder: Path, turn: str) -> None:
    """The peers' weights, in a process of its own so that the GPU is free afterwards; made while it has the turn."""
    name = next(name for name, value in globals().items() if value is shape)
    code = (
        f"import fcntl, gpu, os, pathlib, peer_gpu; turn = os.open({turn!r}, os.O_CREAT | os.O_RDWR); "
        f"fcntl.flock(turn, fcntl.LOCK_EX); model = gpu.random_model(gpu.{name}).cpu(); os.close(turn); "
        f"peer_gpu.write(model, pathlib.Path({str(folder)!r}))"
    )
    if shape is GPT_OSS_20B:
        folder.mkdir(parents=True, exist_ok=True)
        code = f"import gpu, pathlib, peer_gpu; folder = pathlib.Path({str(folder)!r}); "
        code += f"peer_gpu.write_hollow(gpu.empty_model(gpu.{name}), folder)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, capture_output=True)


if __name__ == "__main__":
    main()
