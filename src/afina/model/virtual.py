"""What stands before every sample: the virtual tokens of prompt tuning, the keys and values of prefix tuning.

PEFT puts virtual tokens before the whole row of a batch. Rows of ours hold many samples end to end, or padding on the
left while writing, so here they are put before each sample itself; learning and evaluating, packed and padded, writing
alone and in a batch then all mean the same function. Noise on embeddings (NEFTune) is added here too.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

OFF = "afina_without_virtual_tokens"
BIASES = "afina_first_biases"
"""Where a model notes what its biases were before an adapter came with others."""


class Row(Protocol):
    """What is laid out; `data/batch.py` explains the fields and their shapes."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def attention_mask(self) -> torch.Tensor | None: ...
    @property
    def lengths(self) -> tuple[int, ...] | None: ...
    @property
    def predicting(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Laid:
    """A batch as the model takes it: `inputs` of its forward, and the flat places in rows of `width` that predict."""

    model: nn.Module
    inputs: dict[str, Any]
    lengths: tuple[int, ...] | None
    predicting: torch.Tensor
    width: int


def virtual_tokens(model: nn.Module) -> int:
    """How many stand before each sample; 0 where the method has none, or they are switched off."""
    config: Any = getattr(model, "peft_config", {}).get("default")  # type: ignore[operator, union-attr]
    if config is None or not config.is_prompt_learning or getattr(model, OFF, False):
        return 0
    return int(config.num_virtual_tokens)


def is_prefix(model: nn.Module) -> bool:
    """Whether keys and values stand before each sample, which only rows of one sample have a place for."""
    config: Any = getattr(model, "peft_config", {}).get("default")  # type: ignore[operator, union-attr]
    return config is not None and str(config.peft_type).endswith("PREFIX_TUNING")


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing stands before a sample, no adapter is used, and biases that learnt are as they were."""
    before = getattr(model, OFF, False)
    setattr(model, OFF, True)
    biases: list[tuple[nn.Parameter, torch.Tensor]] = getattr(model, BIASES, [])
    learnt = [parameter.data for parameter, _first in biases]
    try:
        for parameter, first in biases:
            parameter.data = first
        if virtual_tokens_ever(model):
            yield
        else:
            with ExitStack() as stack:
                with warnings.catch_warnings():  # PEFT warns that biases stay learnt; here they do not
                    warnings.simplefilter("ignore")
                    stack.enter_context(model.disable_adapter())  # type: ignore[operator]
                yield
    finally:
        setattr(model, OFF, before)
        for (parameter, _first), value in zip(biases, learnt, strict=True):
            parameter.data = value


def virtual_tokens_ever(model: nn.Module) -> bool:
    """Whether the method is prompt or prefix tuning, switched off or not."""
    config: Any = getattr(model, "peft_config", {}).get("default")  # type: ignore[operator, union-attr]
    return config is not None and bool(config.is_prompt_learning)


def lay(model: nn.Module, batch: Row, noise: float = 0.0) -> Laid:
    """The inputs of the model's forward for a batch. `noise`: NEFTune's alpha, used while the model learns."""
    count, width = virtual_tokens(model), batch.input_ids.shape[1]
    noisy = noise > 0 and model.training
    inputs: dict[str, Any] = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    whole: Any = model.get_base_model() if virtual_tokens_ever(model) else model  # type: ignore[operator]
    if noisy or (count and not is_prefix(model)):
        inputs["inputs_embeds"] = whole.get_input_embeddings()(batch.input_ids)
    else:
        inputs["input_ids"] = batch.input_ids
    if noisy:
        inputs["inputs_embeds"] = _noised(inputs["inputs_embeds"], batch, noise)
    if not count:
        return Laid(whole, inputs, batch.lengths, batch.predicting, width)
    if is_prefix(model):
        return _after_a_prefix(model, whole, inputs, batch, count)
    prompt: torch.Tensor = model.get_prompt(batch_size=1)[0].to(inputs["inputs_embeds"].dtype)  # type: ignore[operator]
    if batch.lengths is None:
        return _padded(whole, inputs, batch, prompt)
    return _packed(whole, inputs, batch, prompt)


def _packed(whole: nn.Module, inputs: dict[str, Any], batch: Row, prompt: torch.Tensor) -> Laid:
    """Every sample of the row moves to the right by its own virtual tokens and those before it."""
    lengths, count = batch.lengths or (), prompt.shape[0]
    device = batch.input_ids.device
    repeats = torch.tensor(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), repeats, output_size=sum(lengths)).to(device)
    places = torch.arange(owner.numel(), device=device) + count * (owner + 1)
    total = owner.numel() + count * len(lengths)
    own = torch.arange(count, device=device)
    firsts = torch.tensor([0, *accumulate(lengths)][:-1], device=device) + count * torch.arange(
        len(lengths), device=device
    )
    virtual = (firsts[:, None] + own).flatten()
    order = torch.empty(total, dtype=torch.long, device=device)
    order[virtual] = own.repeat(len(lengths))
    order[places] = torch.arange(owner.numel(), device=device) + count
    positions = torch.empty(total, dtype=torch.long, device=device)
    positions[virtual] = order[virtual]
    positions[places] = batch.position_ids[0] + count
    row = torch.cat([prompt, inputs["inputs_embeds"][0]])[order][None]
    inputs = {"inputs_embeds": row, "position_ids": positions[None], "attention_mask": None}
    return Laid(whole, inputs, tuple(length + count for length in lengths), places[batch.predicting], total)


def _padded(whole: nn.Module, inputs: dict[str, Any], batch: Row, prompt: torch.Tensor) -> Laid:
    rows, width, count = *batch.input_ids.shape, prompt.shape[0]
    embeds = torch.cat([prompt.expand(rows, -1, -1), inputs["inputs_embeds"]], dim=1)
    before = torch.arange(count, device=embeds.device).expand(rows, -1)
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": torch.cat([before, batch.position_ids + count], dim=1),
        "attention_mask": _widened(batch.attention_mask, count),
    }
    predicting = batch.predicting + count * (batch.predicting // width + 1)
    return Laid(whole, inputs, None, predicting, width + count)


def _after_a_prefix(model: Any, whole: nn.Module, inputs: dict[str, Any], batch: Row, count: int) -> Laid:
    if batch.lengths is not None:
        raise RuntimeError("prefix tuning has no place for its keys inside a packed row")
    inputs |= {
        "past_key_values": model.get_prompt(batch.input_ids.shape[0], max_cache_len=-1),
        "position_ids": batch.position_ids + count,
        "attention_mask": _widened(batch.attention_mask, count),
    }
    return Laid(whole, inputs, None, batch.predicting, batch.input_ids.shape[1])


def _widened(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)


def _noised(embeds: torch.Tensor, batch: Row, alpha: float) -> torch.Tensor:
    """Uniform noise of at most alpha / sqrt(length of the sample * width), Jain et al., 2023, arXiv:2310.05914."""
    if batch.lengths is not None:
        counts = torch.tensor(batch.lengths)
        lengths = torch.repeat_interleave(counts, counts, output_size=sum(batch.lengths)).to(embeds.device)[None]
    elif batch.attention_mask is not None:
        lengths = batch.attention_mask.sum(1, keepdim=True)
    else:
        lengths = torch.full((1, 1), embeds.shape[1], device=embeds.device)
    size = alpha / (lengths * embeds.shape[-1]).sqrt()[..., None].to(embeds.dtype)
    return embeds + torch.empty_like(embeds).uniform_(-1, 1) * size


def prompted(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[nn.Module, dict[str, Any], int]:
    """For writing: the model that generates, its inputs, and how many places of each row of its answer to pass over.

    ids, mask: (rows, width), padded on the left. Virtual tokens stand between padding and prompt, so that every prompt
    has the positions it was trained with, whatever it shares a batch with.
    """
    count, (rows, width) = virtual_tokens(model), ids.shape
    whole = model.get_base_model() if virtual_tokens_ever(model) else model
    if not count:
        return whole, {"input_ids": ids, "attention_mask": mask}, width
    if is_prefix(model):
        # transformers takes what the cache holds from the front of the ids: any will do there.
        dummy = ids.new_zeros(rows, count)
        inputs = {
            "input_ids": torch.cat([dummy, ids], dim=1),
            "attention_mask": torch.cat([mask.new_ones(rows, count), mask], dim=1),
            "past_key_values": model.get_prompt(rows, max_cache_len=-1),
        }
        return whole, inputs, width + count
    embeds = whole.get_input_embeddings()(ids)
    prompt = model.get_prompt(batch_size=1)[0].to(embeds.dtype)
    lengths = mask.sum(1).tolist()
    laid = [
        torch.cat([row[: width - length], prompt, row[width - length :]])
        for row, length in zip(embeds, lengths, strict=True)
    ]
    masks = torch.stack(
        [torch.cat([mask.new_zeros(width - length), mask.new_ones(count + length)]) for length in lengths]
    )
    return whole, {"inputs_embeds": torch.stack(laid), "attention_mask": masks}, 0
