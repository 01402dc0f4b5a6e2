"""Did the merge take effect? Every tensor of the adapter used once, every module changed as its adapter says.

Read from the files: the adapter's on one side, the merged model's on the other, so that what was saved is what is
proved. The base's rows come from the model in memory, before it is merged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.errors import ProofError
from afina.export.gguf_vocab import read_json
from afina.export.weights import Source, tensors_of
from afina.language import _

ROWS = 8
"""Rows of each module that are compared, evenly spread."""
LENGTHS = ".lora_magnitude_vector"
"""What DoRA's row lengths are called."""
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""How PEFT names the rows of an embedding that learn: those of turn tokens."""
CLOSE = 1e-4
"""What the merged rows may differ by from base plus change, as a share of the largest weight: in F32 it is 1e-7."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module: `rows` of the base's weight and of what is added to it, and the share of the
    base's norm that is added."""

    module: str
    rows: torch.Tensor
    base: torch.Tensor
    added: torch.Tensor
    share: float


@torch.no_grad()
def expected_changes(model: nn.Module) -> list[Change]:
    """The change of every module that carries a low-rank adapter; empty where there is none."""
    changes = []
    for name, module in model.named_modules():
        if not (hasattr(module, "lora_A") and len(module.lora_A)):
            continue
        weight = module.get_base_layer().weight  # type: ignore[operator]
        added = _added(module, weight)
        rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0])).long()
        share = float(added.norm() / weight.float().norm().clamp(min=1e-30))
        base = weight[rows.to(weight.device)].float().cpu()
        changes.append(Change(_plain(name), rows, base, added[rows.to(added.device)].cpu(), share))
    return changes


def _added(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to a weight (rows, columns). With DoRA every row of their sum has a learnt length."""
    low: torch.Tensor = module.get_delta_weight("default").float()
    if "default" not in module.lora_magnitude_vector:
        return low
    whole = weight.float() + low.to(weight.device)
    lengths = module.lora_magnitude_vector["default"].weight.float().to(weight.device)
    turned: torch.Tensor = whole * (lengths / whole.norm(dim=1))[:, None] - weight.float()
    return turned


def prove_merge(changes: list[Change], adapter: Path, merged: Path) -> dict[str, Any]:
    """Compare the merged model's files with base and adapter. Returns the facts; raises ProofError on a difference."""
    tensors = tensors_of(adapter)
    sides = ("lora_A", "lora_B", *(["lora_magnitude_vector"] if any(LENGTHS in name for name in tensors) else []))
    used = {f"{change.module}.{side}" for change in changes for side in sides}
    there = {_plain(name).removesuffix(".weight") for name in tensors if ".lora_" in name}
    if used != there or len(there) != sum(".lora_" in name for name in tensors):
        raise ProofError(
            _("The adapter has tensors that the merge did not use, such as {name}.").format(
                name=min(used ^ there, default="")
            ),
            hint=_("Nothing was kept. Please report this with the model's name."),
        )
    source = Source(merged)
    modules = []
    try:
        for change in changes:
            name = f"{change.module}.weight"
            found = torch.cat([source.rows(name, row, row + 1) for row in change.rows.tolist()]).float()
            expected = change.base + change.added
            if float((found - expected).abs().max()) > CLOSE * float(expected.abs().max()):
                raise ProofError(
                    _("The merged model lacks the training of {module}.").format(module=change.module),
                    hint=_("Nothing was kept. Please report this with the model's name."),
                )
            modules.append({"module": change.module, "change": change.share})
        for name, tensor in _others(tensors).items():
            if not any(torch.equal(found, tensor.float()) for found in _learnt(source, name, tensors, adapter)):
                raise ProofError(
                    _("The merged model lacks the training of {module}.").format(module=_plain(name)),
                    hint=_("Nothing was kept. Please report this with the model's name."),
                )
    finally:
        source.close()
    return {"adapter_tensors": len(tensors), "modules": modules}


def _others(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors that are no part of a low-rank term."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def _learnt(source: Source, name: str, tensors: dict[str, torch.Tensor], adapter: Path) -> Iterator[torch.Tensor]:
    """What of the merged weights may be the adapter's tensor: the same tensor, or the rows of turn tokens in it."""
    if name.endswith(TOKEN_ROWS):
        layer = _plain(name).removesuffix(TOKEN_ROWS)
        rows = read_json(adapter.parent / "adapter_config.json")["trainable_token_indices"][layer.rpartition(".")[2]]
        yield torch.cat([source.rows(f"{layer}.weight", row, row + 1) for row in rows]).float()
        return
    # A head tied to the embedding stands in the adapter twice, in the model once.
    same = {_plain(other) for other, tensor in _others(tensors).items() if torch.equal(tensor, tensors[name])}
    for other in same & source.names():
        yield source.tensor(other).float()


def _plain(name: str) -> str:
    """A name as the model has it without PEFT's wrapping."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
