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
from afina.model.quantize import weight_of

ROWS = 8
"""Rows of each module that are compared, evenly spread."""
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""How PEFT names the rows of an embedding that learn: those of turn tokens."""
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""What the merged rows may differ by from base plus change, as a share of the largest weight: in F32 it is 1e-7, in the
others half a unit of the last place."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the model: `rows` of the base's and of what is added to it (of three
    dimensions, the first entries of the second), and the share of the base's norm that is added. `keys` are the
    adapter's tensors that say so."""

    tensor: str
    rows: torch.Tensor
    base: torch.Tensor
    added: torch.Tensor
    share: float
    keys: frozenset[str]

    @property
    def module(self) -> str:
        """The module, or where a parameter of its own carries the adapter, that."""
        return self.tensor.removesuffix(".weight")


@torch.no_grad()
def expected_changes(model: nn.Module) -> list[Change]:
    """The change of every tensor that carries a low-rank adapter; empty where there is none."""
    changes = []
    for name, module in model.named_modules():
        if not (hasattr(module, "lora_A") and len(module.lora_A)):
            continue
        of_its_own = getattr(module, "parameter_name", None)  # a tensor of experts, not a linear layer
        weight = module.get_param() if of_its_own else weight_of(module.get_base_layer())  # type: ignore[operator]
        weight = weight.detach().float()
        added = module.get_delta_weight("default").float()  # type: ignore[operator]
        sides = {"lora_A.weight", "lora_B.weight"}
        if getattr(module, "use_dora", {}).get("default"):  # type: ignore[union-attr]
            lengths = module.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
            turned = bool(getattr(module, "fan_in_fan_out", False))  # GPT-2's matrices lie the other way round
            factors = lengths / (weight + added).norm(dim=0 if turned else 1)
            added = (weight + added) * (factors[None] if turned else factors[:, None]) - weight
            sides.add("lora_magnitude_vector")
        rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0])).long()
        share = float(added.norm() / weight.norm().clamp(min=1e-30))
        tensor = f"{_plain(name)}.{of_its_own or 'weight'}"
        keys = frozenset(f"{name}.{side}" for side in sides)
        changes.append(Change(tensor, rows, _some(weight, rows), _some(added, rows), share, keys))
    return changes


def _some(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    chosen = weight[rows.to(weight.device)]
    return (chosen[:, :ROWS] if chosen.ndim > 2 else chosen).cpu()


def prove_merge(
    changes: list[Change], adapter: Path, merged: Path, precision: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Compare the merged model's files with base and adapter. Returns the facts; raises ProofError on a difference."""
    tensors = tensors_of(adapter)
    there = {name for name in tensors if ".lora_" in name}
    used = {key for change in changes for key in change.keys}
    if used != there or sum(len(change.keys) for change in changes) != len(there):
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
            found = torch.cat([source.rows(change.tensor, row, row + 1) for row in change.rows.tolist()]).float()
            found = found[:, :ROWS] if found.ndim > 2 else found
            expected = change.base + change.added
            if float((found - expected).abs().max()) > CLOSE[precision] * float(expected.abs().max()):
                raise ProofError(
                    _("The merged model lacks the training of {module}.").format(module=change.module),
                    hint=_("Nothing was kept. Please report this with the model's name."),
                )
            modules.append({"module": change.module, "change": change.share})
        for name, tensor in _others(tensors).items():
            wanted = tensor.to(precision).float()
            if not any(torch.equal(found, wanted) for found in _learnt(source, name, tensors, adapter)):
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
    # Some families' files have other names than their models (GPT-NeoX's head): whatever is as large may be it.
    shape = tuple(tensors[name].shape)
    like = (other for other in sorted(source.names()) if source.stored_shape(other) == shape)
    for other in same & source.names() or like:
        yield source.tensor(other).float()


def _plain(name: str) -> str:
    """A name as the model has it without PEFT's wrapping."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
