"""Several adapters asked in one batch: mixed in one forward pass, beside turns, a batch for each adapter.

    python benchmarks/personalities.py >> benchmarks/results/personalities.jsonl

Random models of a few layers on one core; 8 prompts of 24 tokens, 24 tokens each, greedy. Seconds are processor time
of the whole call, the least of three in turns with each other.
"""

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from afina.artifact import versions
from afina.model.attach import attach
from afina.model.generate import generate
from afina.model.mxfp4 import pack_experts
from afina.model.personalities import Personalities
from afina.model.saved import save_adapter
from afina.recipe.schema import Lora

WIDTH: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
}
PROMPTS = [[(7 * row + 3 * place) % 4000 + 3 for place in range(24)] for row in range(8)]
ASKED: dict[str, Any] = {"end_ids": [], "pad_id": 0, "max_new_tokens": 24}


def dense() -> nn.Module:
    return AutoModelForCausalLM.from_config(LlamaConfig(**WIDTH, intermediate_size=1408))


def mixture(packed: bool) -> nn.Module:
    config = GptOssConfig(
        **WIDTH, intermediate_size=512, head_dim=64, num_local_experts=16, num_experts_per_tok=4, sliding_window=128
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if packed:
        pack_experts(model)
        for name, buffer in model.named_buffers():
            if name.endswith("_blocks"):
                buffer.random_(0, 256)
            elif name.endswith("_scales"):
                buffer.fill_(121)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Lora]] = {
    "LoRA": (dense, Lora(rank=16)),
    "DoRA": (dense, Lora(rank=16, dora=True)),
    "experts and router": (lambda: mixture(False), Lora(rank=8, experts=True, router=True)),
    "experts and router, packed": (lambda: mixture(True), Lora(rank=8, experts=True, router=True)),
}


def in_turns(crew: Personalities, names: list[str]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for name in dict.fromkeys(names):
        places = [place for place, asked in enumerate(names) if asked == name]
        with crew.answering(name) as model:
            found |= dict(zip(places, generate(model, [PROMPTS[place] for place in places], **ASKED), strict=True))
    return [found[place] for place in range(len(names))]


def spent(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    for case, (make, method) in CASES.items():
        torch.manual_seed(0)
        crew = Personalities(make().eval())
        with tempfile.TemporaryDirectory() as place:
            for number in range(4):
                torch.manual_seed(0)
                adapted = attach(make(), method, seed=number)
                with torch.no_grad():
                    for name, parameter in adapted.named_parameters():
                        if "lora_B" in name:
                            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
                save_adapter(adapted, Path(place) / str(number), base="x")
                crew.load(str(number), Path(place) / str(number))
        for adapters in (1, 2, 4):
            names = [str(row % adapters) for row in range(len(PROMPTS))]
            mix, wait = partial(crew.generate, PROMPTS, names, **ASKED), partial(in_turns, crew, names)
            same = sum(map(list.__eq__, mix(), wait()))
            times = [(spent(mix), spent(wait)) for _ in range(3)]
            mixed, turns = (round(min(each), 2) for each in zip(*times, strict=True))
            print(
                json.dumps(
                    {
                        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                        "commit": commit(),
                        "command": "python benchmarks/personalities.py",
                        "adapters": case,
                        "in_the_batch": adapters,
                        "mixed_s": mixed,
                        "turns_s": turns,
                        "equal_answers": f"{same} of {len(PROMPTS)}",
                        "versions": versions(),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
