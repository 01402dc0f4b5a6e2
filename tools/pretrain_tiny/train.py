"""Make `afina/tiny`: generate the corpus, learn the vocabulary, train a small Llama on it, and write the model folder.

    python tools/pretrain_tiny/train.py --real ../shared --out DIR

A few minutes on a data-centre GPU; on a CPU, hours (ask for fewer --tokens). Rows of 512 tokens hold several documents
each; attention does not cross from one into another and positions start again, so the model meets every text as it will
when it is used: alone and from position 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import held_out, shards
from tokenizer import DOCUMENT, END, PAD, TURN, VOCABULARY, learn
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

ROW = 512
SHARD = 8_000_000  # characters
CONTROL = 4  # the first ids are control tokens
# Against learning the generator's sentences by heart: a share of the tokens shown is replaced at random, less and less
# until BLURRED of the steps are over, and every third shard has its words cut into pieces other than the usual ones.
BLUR, BLURRED = 0.12, 0.75
LOOSE_EVERY, LOOSENESS = 3, 0.1


def configuration(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape: 3.9 million parameters, every input width a multiple of 256 so that k-quants apply."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        bos_token_id=tokenizer.convert_tokens_to_ids(DOCUMENT),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, looseness: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of `texts` one after another (uint16), and which of them begin a document (bool), both (tokens,).

    `looseness` is the chance that a merge is left out (BPE-dropout, arXiv:1910.13267; the library draws it, unseeded).
    """
    marked = [text if text.startswith(TURN) else DOCUMENT + text for text in texts]
    tokenizer.backend_tokenizer.model.dropout = looseness
    encoded = tokenizer(marked, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    starts = np.zeros(sum(map(len, encoded)), dtype=bool)
    starts[np.cumsum([0, *map(len, encoded[:-1])])] = True
    return np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in encoded]), starts


def rows(parts: Iterable[tuple[np.ndarray, np.ndarray]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and starts cut into rows, both (rows, ROW); one cut by the end of a row begins again in the next."""
    tokens, starts = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    count = len(tokens) // ROW
    cut = starts[: count * ROW].reshape(count, ROW).copy()
    cut[:, 0] = True
    ids = tokens[: count * ROW].astype(np.int16).reshape(count, ROW)
    return torch.from_numpy(ids).to(device), torch.from_numpy(cut).to(device)


def lay_out(starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (batch, ROW) and who may look at whom (batch, 1, ROW, ROW), from where the documents start."""
    order = torch.arange(starts.shape[1], device=starts.device)
    positions = order - torch.cummax(torch.where(starts, order, 0), dim=1).values
    document = starts.cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]) & (order[:, None] >= order[None, :])
    return positions, seen[:, None]


def blur(ids: torch.Tensor, share: float) -> torch.Tensor:
    """`ids` with a `share` of them replaced at random; control tokens stay."""
    hit = (torch.rand(ids.shape, device=ids.device) < share) & (ids >= CONTROL)
    return torch.where(hit, torch.randint_like(ids, CONTROL, VOCABULARY), ids)


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, starts: torch.Tensor, shown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss over `ids` (batch, ROW) when the model is `shown` the same or a blurred version, and the number
    of tokens that it is over: each but the first of its document."""
    positions, seen = lay_out(starts)
    targets = torch.where(starts, -100, ids.long())[:, 1:]
    hidden = model.model(
        input_ids=shown.long(), position_ids=positions, attention_mask=seen, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, (targets != -100).sum()


def learning_rate(step: int, steps: int, peak: float, warm: int = 150) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(count: int, size: int, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Row numbers, `size` at a time, each pass over the rows in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).to(device).split(size)[: max(1, count // size)]


def optimiser(model: LlamaForCausalLM, cuda: bool) -> torch.optim.Optimizer:
    """AdamW; the norms' gains and the embedding (also the output matrix) are not decayed."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=cuda)


@torch.no_grad()
def measure(model: LlamaForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Loss over held-out texts, in nats per token (whole rows only)."""
    ids, starts = rows([encode(texts, tokenizer)], model.device)
    total = tokens = 0.0
    for some_ids, some_starts in zip(ids.split(32), starts.split(32), strict=True):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss, number = loss_of(model, some_ids, some_starts, some_ids)
        total, tokens = total + loss.item(), tokens + number.item()
    return round(total / max(tokens, 1), 3)


def train(model: LlamaForCausalLM, ids: torch.Tensor, starts: torch.Tensor, given: argparse.Namespace) -> int:
    """Train `model` in place; returns the number of tokens seen."""
    cuda = model.device.type == "cuda"
    steps = max(1, given.tokens // (given.batch * ROW))
    step_loss = torch.compile(loss_of) if cuda else loss_of
    optimizer = optimiser(model, cuda)
    order = batches(len(ids), given.batch, given.seed, model.device)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, given.lr)
        chosen = next(order)
        clean = ids[chosen]
        shown = blur(clean, BLUR * max(0.0, 1 - step / (BLURRED * steps)))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            loss, number = step_loss(model, clean, starts[chosen], shown)
        (loss / number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 40) == 0 or step == steps - 1:
            seconds, seen = time.perf_counter() - began, (step + 1) * given.batch * ROW / 1e6
            mean = (loss / number).item()
            print(f"step {step} of {steps}: loss {mean:.3f}, {seen:.0f} M tokens in {seconds:.0f} s", flush=True)
    return int(steps * given.batch * ROW)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Greedy answers to a few greetings and openings, in both languages."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in (
            "Hola",
            "Buenos días",
            "Hello",
            "¿Quién eres?",
            "¿Cuánto es 12 + 30?",
            "Cuéntame un cuento.",
            "Thank you",
            "Fui a cenar y la sopa estaba fría y el camarero fue un grosero.",
            "El hotel estaba limpio y cerca del mar.",
        )
    ] + [DOCUMENT + text for text in ("Había una vez", "Once upon a time", "Compré un móvil y")]
    answers = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False).to(
            model.device
        )
        out = model.generate(**ids, max_new_tokens=60, do_sample=False)
        answers[prompt] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    return answers


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--real", type=Path, required=True, help="the folder that holds data/gsm8k and the rest")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--tokenizer", type=Path, help="a folder to take the vocabulary from instead of learning it")
    arguments.add_argument("--tokens", type=int, default=750_000_000, help="how many to train on")
    arguments.add_argument("--shards", type=int, default=48, help="of 8 million characters each; shown again as needed")
    arguments.add_argument("--batch", type=int, default=256, help="rows of 512 tokens a step")
    arguments.add_argument("--lr", type=float, default=3e-3)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = arguments.parse_args()

    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    else:
        tokenizer = learn(text for shard in shards(given.real, 1, 3 * SHARD) for text in shard)
    parts = [
        encode(texts, tokenizer, LOOSENESS if index % LOOSE_EVERY == LOOSE_EVERY - 1 else None)
        for index, texts in enumerate(shards(given.real, given.shards, SHARD, given.workers))
    ]
    ids, starts = rows(parts, device)
    print(f"{ids.numel() / 1e6:.1f} M tokens of text ready in {time.perf_counter() - began:.0f} s", flush=True)

    torch.manual_seed(given.seed)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(configuration(tokenizer)).to(device)
    began = time.perf_counter()
    seen = train(model, ids, starts, given)
    seconds = time.perf_counter() - began

    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    tokenizer.backend_tokenizer.model.dropout = None
    figures = {
        "parameters": model.num_parameters(),
        "tokens_seen": seen,
        "tokens_of_text": ids.numel(),
        "train_seconds": round(seconds, 1),
        "held_out": {name: measure(model, texts, tokenizer) for name, texts in held_out(given.real).items() if texts},
        "samples": sample(model, tokenizer),
    }
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    (given.out / "figures.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
