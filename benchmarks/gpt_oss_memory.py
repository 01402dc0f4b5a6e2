"""Does gpt-oss-20b's true shape train inside 16 GB, its experts packed in MXFP4? Random weights drawn on the GPU.

    python benchmarks/gpt_oss_memory.py                the bytes by what holds them, then training steps under the cap
    python benchmarks/gpt_oss_memory.py --account      the bytes alone, from shapes; needs no GPU
    python benchmarks/gpt_oss_memory.py --experts      adapters on every expert and the router too

One sample, half of its tokens learnt, LoRA on q, k, v and o, the allocator held to 14.9 GiB (16 GB) and the plan made
for it; --engine reference: transformers and PEFT, layers computed again in the backward. 120b: --model 120b.
"""

import argparse
import json
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from afina.artifact import versions
from afina.data.batch import Batch
from afina.engine.engine import Engine
from afina.engine.proof import prove
from afina.model.attach import attach, learning, recompute
from afina.model.attention import NAME as CAREFUL
from afina.model.loss import summed_loss
from afina.model.mxfp4 import pack_experts
from afina.model.packed import packed_attention
from afina.recipe.schema import Lora
from afina.train.run import USABLE

SHAPES = {"20b": {"num_hidden_layers": 24, "num_local_experts": 32}, "120b": {}, "tiny": {"num_hidden_layers": 2}}
SHAPES["tiny"] |= {"num_local_experts": 4, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 199}
SHAPES["tiny"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WARM_UP, TIMED = 2, 4


def packed_model(name: str, device: str) -> nn.Module:
    """The true shape with packed experts; on a real device with random weights."""
    config = GptOssConfig(**SHAPES[name], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = CAREFUL
    with torch.device("meta"):
        model = pack_experts(GptOssForCausalLM(config).to(torch.bfloat16))
    if device == "meta":
        return model
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("_blocks"):
                buffer.random_(0, 256, generator=generator)
            elif name.endswith("_scales"):
                buffer.random_(117, 121, generator=generator)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, 0.02, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def account(model: nn.Module) -> dict[str, float]:
    """GB (10^9 bytes) by what holds them."""
    found: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = next(
            (part for part in ("lora", "experts", "self_attn", "embed_tokens", "lm_head") if part in name), "rest"
        )
        found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
    return {kind: round(count / 1e9, 3) for kind, count in found.items()} | {"all": round(sum(found.values()) / 1e9, 3)}


def batch_of(length: int, vocabulary: int, device: str) -> Batch:
    ids = torch.randint(5, vocabulary - 1, (1, length), generator=torch.Generator().manual_seed(1))
    places = torch.arange(length // 2, length - 1)
    return Batch(
        input_ids=ids, position_ids=torch.arange(length)[None], attention_mask=torch.ones(1, length, dtype=torch.bool),
        lengths=(length,), predicting=places, targets=ids[0, places + 1], owner=torch.zeros_like(places), samples=(0,),
        tokens=length,
    ).to(torch.device(device))  # fmt: skip


def hold(gib: float) -> None:
    """No more than so much for the allocator from now on."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()


def alive(count: int = 24) -> str:
    """What the GPU's allocator holds, MiB by the line of ours that asked for it, largest first; and what lies idle."""
    found: dict[str, int] = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        for block in segment["blocks"]:
            place = "idle"
            if block["state"].startswith("active"):
                ours = (frame for frame in block.get("frames", []) if "afina" in frame["filename"])
                frame = next(ours, None) or next(iter(block.get("frames", [])), None)
                place = f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" if frame else "before"
            found[place] = found.get(place, 0) + block["size"]
    largest = sorted(found.items(), key=lambda pair: -pair[1])[:count]
    return "\n".join(f"{size / 2**20:10.1f} MiB  {place}" for place, size in largest)


def fuse(
    model: nn.Module, parameters: list[nn.Parameter], length: int, gib: float, device: str
) -> tuple[Engine, dict[str, Any]]:
    """The engine, planned for the cap, which proved itself on 512 tokens; as `afina train` does it where memory is
    short."""
    engine, about = Engine(model, torch.bfloat16), {}
    moments = sum(2 * parameter.numel() * parameter.element_size() for parameter in parameters)

    def plan() -> None:
        torch.cuda.empty_cache()
        standing = moments + (torch.cuda.memory_allocated() if device == "cuda" else 0)
        found = engine.plan(length, length, int(gib * USABLE * 2**30) - standing)
        rungs = Counter((" ".join(sorted(one.away)), " ".join(sorted(one.again))) for one in found.placements)
        placed = [{"layers": number, "away": away, "again": again} for (away, again), number in rungs.items()]
        about.update(planned_gib=round((standing + found.bytes) / 2**30, 2), host=found.host, placed=placed)
        print(json.dumps(about), flush=True)

    batch = batch_of(min(length, 512), model.config.vocab_size, device)
    with packed_attention(model):
        proof = prove(engine, model, batch, torch.autocast(device, dtype=torch.bfloat16), parameters, plan)
    if not proof.holds:
        raise SystemExit(f"{proof}")
    return engine, about | {"proof": {name: float(f"{value:.1e}") for name, value in vars(proof).items()}}


def measure(name: str, length: int, gib: float, lora: Lora, device: str, fused: bool) -> dict[str, Any]:
    cuda, about = device == "cuda", {"engine": "fused" if fused else "reference"}
    model = packed_model(name, "meta")
    needed = sum(part.numel() * part.element_size() for part in (*model.parameters(), *model.buffers())) / 2**30
    early = needed + 1 < gib  # else the cap begins once the plan has sent the model's ends away
    if cuda and early:
        hold(gib)
    model = attach(packed_model(name, device), lora, seed=0).train()
    parameters = [parameter for _name, parameter in learning(model)]
    held = account(model)
    batch = batch_of(length, model.config.vocab_size, device)
    if fused:
        engine, found = fuse(model, parameters, length, gib, device)
        loss_fn, about = engine.summed_loss, about | found
    else:
        loss_fn = summed_loss
        recompute(model)
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    if cuda and not early:
        hold(gib)
    seconds, losses = [], []
    for turn in range(WARM_UP + TIMED):
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16), packed_attention(model):
            loss = loss_fn(model, batch) / batch.targets.numel()
            loss.backward()  # within, as what is computed again attends again
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        if turn >= WARM_UP:
            seconds.append(time.perf_counter() - started)
        if not norm.item() > 0:
            raise SystemExit("no gradient")
    if not losses[-1] < losses[0]:
        raise SystemExit(f"it does not learn: {losses}")
    return {
        "workload": f"gpt-oss-{name} 1x{length} MXFP4 r{lora.rank}{' experts' if lora.experts else ''}",
        **about,
        "held_gb": held,
        "cap_gib": gib,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None,
        "tokens_per_second": round(length / sorted(seconds)[len(seconds) // 2]),
        "losses": losses,
        "device": torch.cuda.get_device_name() if cuda else device,
        "versions": versions(),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=SHAPES, default="20b")
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--gib", type=float, default=14.9)
    options.add_argument("--account", action="store_true")
    options.add_argument("--experts", action="store_true")
    options.add_argument("--engine", choices=["fused", "reference"], default="fused")
    options.add_argument("--device", default="cuda")
    options.add_argument("--trace", action="store_true", help="where it runs out of memory, say what holds it")
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpt_oss_memory.jsonl")
    chosen = options.parse_args()
    print(json.dumps(account(packed_model(chosen.model, "meta"))), flush=True)
    if chosen.account:
        return
    lora = Lora(rank=chosen.rank, alpha=2.0 * chosen.rank, experts=chosen.experts, router=chosen.experts)
    if chosen.trace:
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    try:
        measured = measure(chosen.model, chosen.length, chosen.gib, lora, chosen.device, chosen.engine == "fused")
    except torch.OutOfMemoryError:
        if chosen.trace:
            print(alive(), flush=True)
        raise
    about = {"command": " ".join(["python benchmarks/gpt_oss_memory.py", *sys.argv[1:]]), "commit": commit()}
    found = json.dumps({**measured, **about, "date": f"{date.today()}"})
    print(found)
    with chosen.results.open("a") as file:
        file.write(found + "\n")


if __name__ == "__main__":
    main()
