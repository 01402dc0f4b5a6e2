"""Parts taken out, so that the model is smaller and faster wherever it runs: whole layers, channels of the MLPs.

A layer's influence is how far it turns what flows through it, 1 - cosine of what enters and what leaves, on average
over tokens (ShortGPT, Men et al., 2024, arXiv:2403.03853); the layers that turn least go. A channel adds its input x
times a column w of the matrix that leads out of the MLP, so its weight is the mean of |x w|^2; in each layer as many of
the lightest go.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from afina.errors import ModelError
from afina.language import _

MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"))
"""What the linear layers of an MLP are called, the one that leads out of it last."""
STEPS = (256, 32)
"""Channels that stay are a multiple of these where the model's own are: blocks of k-quants, and of all others."""
BLOCKS = 8
"""A multiple must leave so many choices at least."""


def layers_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder layers, in the module and under the name that hold them. Raises ModelError where there are none."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name, child
    raise ModelError(_("This model's decoder layers are not found, so none can be taken out."))


@torch.inference_mode()
def influences(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[float]:
    """How far each decoder layer turns what flows through it, over all tokens of `sequences`."""
    _parent, _name, layers = layers_of(model)
    sums, tokens = [0.0] * len(layers), sum(len(ids) for ids in sequences)

    def note(place: int) -> Any:
        def add(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[place] += float((1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum())

        return add

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(note(place), with_kwargs=True).remove)
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    return [total / max(1, tokens) for total in sums]


def layers_to_keep(found: Sequence[float], share: float) -> list[int]:
    """Which layers stay when `share` of them goes, those of the least influence. Raises ModelError for none or all."""
    going = round(share * len(found))
    if not 0 < going < len(found):
        raise ModelError(
            _("The model has {count} layers; a share of {share:g} takes out {going} of them.").format(
                count=len(found), share=share, going=going
            ),
            hint=_("Take a share that means at least one layer and leaves one, or another --method."),
        )
    gone = sorted(range(len(found)), key=lambda place: (found[place], place))[:going]
    return [place for place in range(len(found)) if place not in gone]


def keep_layers(model: nn.Module, kept: Sequence[int]) -> None:
    """Take all other decoder layers out, in place. Raises ModelError where the layers are not of one kind."""
    parent, name, layers = layers_of(model)
    whole: Any = model
    config: Any = whole.config.get_text_config()
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(layers):
            if any(entry != value[0] for entry in value):
                raise ModelError(
                    _("Layers of this model take turns ({key}), and programs that run it count on the order.").format(
                        key=key
                    ),
                    hint=_("Take --method channels, or wanda."),
                )
            setattr(config, key, [value[place] for place in kept])
    setattr(parent, name, nn.ModuleList(layers[place] for place in kept))
    config.num_hidden_layers = len(kept)
    for place, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                module.layer_idx = place


def channels_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The MLPs by the name of their module, and what their linear layers are called. Raises ModelError."""
    _parent, _name, layers = layers_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        here = {
            names[id(module)]: parts
            for module in layer.modules()
            for parts in MLPS
            if all(isinstance(getattr(module, part, None), nn.Module) for part in parts)
        }
        if len(here) != 1:
            raise ModelError(
                _("The MLPs of this model are not of a form that is known here."),
                hint=_("Take --method layers, or wanda."),
            )
        found |= here
    return found


def channels_to_keep(model: nn.Module, squares: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Of each MLP the channels that stay, in their order, when about `share` go: as many in each.

    squares: of each matrix (columns,) the mean square of its input. Raises ModelError where none would go or stay.
    """
    kept: dict[str, torch.Tensor] = {}
    for name, parts in channels_of(model).items():
        leading_out: Any = model.get_submodule(f"{name}.{parts[-1]}")
        weight = leading_out.weight.detach().float()
        columns = weight.square().sum(0 if isinstance(leading_out, nn.Linear) else 1).cpu()
        worth = columns * squares[f"{name}.{parts[-1]}.weight"]
        staying = channels_left(worth.numel(), share)
        kept[name] = worth.argsort(descending=True, stable=True)[:staying].sort().values
    return kept


def channels_left(channels: int, share: float) -> int:
    """How many of so many channels stay when about `share` go. Raises ModelError where none would go or stay."""
    step = next((step for step in STEPS if channels % step == 0 and channels >= BLOCKS * step), 1)
    staying = step * round((1 - share) * channels / step)
    if not 0 < staying < channels:
        raise ModelError(
            _("An MLP has {channels} channels; with a share of {share:g} {staying} of them stay.").format(
                channels=channels, share=share, staying=staying
            ),
            hint=_("Channels go in blocks of {step}. Take another share, or another --method.").format(step=step),
        )
    return staying


@torch.no_grad()
def keep_channels(model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Take all other channels out of each MLP, in place."""
    whole: Any = model
    config: Any = whole.config.get_text_config()
    for name, parts in channels_of(model).items():
        *inside, last = (model.get_submodule(f"{name}.{part}") for part in parts)
        channels, places = _sides(last)[0], kept[name]
        for layer in inside:  # gate and up may be two halves of one matrix
            halves = [places + start for start in range(0, _sides(layer)[1], channels)]
            _cut(layer, torch.cat(halves), outputs=True)
        _cut(last, places, outputs=False)
        setattr(config, "n_inner" if hasattr(config, "n_inner") else "intermediate_size", places.numel())


def _sides(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


def _cut(layer: Any, places: torch.Tensor, *, outputs: bool) -> None:
    """Leave a linear layer these of its outputs, or of its inputs."""
    plain = isinstance(layer, nn.Linear)
    there = places.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.index_select(int(outputs != plain), there), requires_grad=False)
    if outputs and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[there], requires_grad=False)
    name = ("out_features" if outputs else "in_features") if plain else ("nf" if outputs else "nx")
    setattr(layer, name, places.numel())
