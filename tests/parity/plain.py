"""The peer: plain PEFT and transformers in a loop anybody would write. One sample at a time, nothing of Afina's."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

STEPS, BATCH, SEED = 20, 3, 7


def plain_model(folder: Path, case: Any) -> nn.Module:
    """Base and method by PEFT's and transformers' own arguments."""
    held, method = case.model.quantization, case.method
    quantised = None
    if held == "int8":
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    elif held != "none":
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=held,
            bnb_4bit_use_double_quant=case.model.double_quantization,
            bnb_4bit_compute_dtype=torch.float32,
        )
    where: dict[str, Any] = {"device_map": {"": "cpu"}} if quantised else {}
    kind = AutoConfig.from_pretrained(folder).model_type
    where["attn_implementation"] = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"  # soft caps and sinks
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantised, **where)
    if method.name == "full":
        if method.layers is not None:
            base.requires_grad_(False)
            for number in method.layers:
                layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))
                layers[number].requires_grad_(True)
        return base
    torch.manual_seed(SEED)
    if method.name == "lora":
        targets = method.targets
        if targets == ["*.layers.1.*"]:
            targets = r".*\.layers\.1\..*(_proj|dense|fc1|fc2|qkv_proj|gate_up_proj)"
        model = get_peft_model(
            base,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=method.rank,
                lora_alpha=method.alpha,
                target_modules=targets,
                bias=method.bias,
                use_rslora=method.rslora,
                use_dora=method.dora,
                init_lora_weights={"default": True, "pissa": "pissa", "loftq": True}[method.init],
                modules_to_save=method.modules_to_save or None,
                ensure_weight_tying=bool(method.modules_to_save and base.config.tie_word_embeddings),
            ),
        )
        if method.init == "loftq":
            begin_as_loftq(model, folder, method)
        return model
    kind = PromptTuningConfig if method.name == "prompt-tuning" else PrefixTuningConfig
    more = {"prompt_tuning_init": "SAMPLE_VOCAB"} if method.name == "prompt-tuning" else {}
    return get_peft_model(base, kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=method.virtual_tokens, **more))


@torch.no_grad()
def begin_as_loftq(model: nn.Module, folder: Path, method: Any) -> None:
    """One round of LoftQ, written out: the rank-r matrix nearest to what quantising lost."""
    import bitsandbytes

    whole = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            weight = module.base_layer.weight
            held = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            u, s, v = torch.linalg.svd(whole[name.removeprefix("base_model.model.")].weight - held, full_matrices=False)
            scale = method.alpha / method.rank
            module.lora_A["default"].weight.copy_(torch.diag((s[: method.rank] / scale).sqrt()) @ v[: method.rank])
            module.lora_B["default"].weight.copy_(u[:, : method.rank] @ torch.diag((s[: method.rank] / scale).sqrt()))


def summed_loss(model: nn.Module, row: Any) -> tuple[torch.Tensor, int]:
    """Cross-entropy over a sample's learnt tokens, by the model's own logits, and how many there are."""
    ids = torch.from_numpy(row.ids.astype("int64"))[None]
    learnt = torch.from_numpy(row.learnt)[1:]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :].float()
    loss = nn.functional.cross_entropy(logits[:-1][learnt], ids[0, 1:][learnt], reduction="sum")
    return loss, int(learnt.sum())


def one_step(model: nn.Module, rows: list[Any]) -> float:
    """Backward of a step's mean loss."""
    count = sum(int(row.learnt[1:].sum()) for row in rows)
    total = 0.0
    for row in rows:
        loss, _learnt = summed_loss(model, row)
        (loss / count).backward()
        total += loss.item() / count
    return total


def plain_losses(folder: Path, case: Any, rows: list[Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of 20 steps of AdamW, and what was learnt."""
    model = plain_model(folder, case)
    model.train()
    rate, ratio = case.training.learning_rate, getattr(case.method, "lora_plus_ratio", 1.0)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter], "lr": rate * ratio if "lora_B" in name else rate}
        for name, parameter in learning.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        losses.append(one_step(model, [rows[(step * BATCH + place) % len(rows)] for place in range(BATCH)]))
        torch.nn.utils.clip_grad_norm_(learning.values(), case.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: parameter.detach() for name, parameter in learning.items()}


def plain_gradients(folder: Path, case: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Gradients of the first step, every B perturbed by the same noise as ours."""
    model = plain_model(folder, case)
    model.train()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    one_step(model, rows[:BATCH])
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
