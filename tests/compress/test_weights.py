"""Which weights go, by the definitions of the papers, computed plainly in double precision."""

import numpy as np
import pytest
import torch
from families import build
from small import llama
from torch import nn

from afina.compress.weights import Pattern, zero_weights, zeros_of
from afina.errors import ModelError
from afina.model.imatrix import collect
from afina.model.targets import body_of

IDS = [[1, 5, 9, 33, 80, 7, 2, 64], [3, 3, 17, 90, 41]]


def matrices(model: nn.Module) -> dict[str, np.ndarray]:
    """(outputs, inputs) of every linear layer but the head."""
    return {
        name: (module.weight if isinstance(module, nn.Linear) else module.weight.t()).detach().double().numpy().copy()
        for name, module in body_of(model).items()
    }


def norms(model: nn.Module) -> dict[str, np.ndarray]:
    """Of each matrix the norm of every column's input over all tokens."""
    seen: dict[str, list[np.ndarray]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.setdefault(name, []).append(
                inputs[0].detach().double().reshape(-1, inputs[0].shape[-1]).numpy()
            )
        )
        for name, module in body_of(model).items()
    ]
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: np.sqrt((np.concatenate(parts) ** 2).sum(0)) for name, parts in seen.items()}


def smallest_of(scores: np.ndarray, count: int) -> np.ndarray:
    marks = np.zeros(scores.shape, bool)
    np.put_along_axis(marks, np.argsort(scores, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return marks


@pytest.mark.parametrize("family", ["llama2", "gpt2", "phi3"])
def test_wanda_is_size_times_norm_within_each_output(family):
    model = build(family)
    before, inputs = matrices(model), norms(model)
    zero_weights(model, "wanda", 0.4, None, collect(model, IDS))
    for name, weight in matrices(model).items():
        gone = smallest_of(np.abs(before[name]) * inputs[name], round(0.4 * weight.shape[1]))
        assert np.array_equal(weight, np.where(gone, 0, before[name])), name


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sizes_are_compared_within_a_matrix_or_over_all(share):
    model, whole = llama(), llama()
    before = matrices(model)
    zero_weights(model, "magnitude", share, None, {})
    for name, weight in matrices(model).items():
        gone = smallest_of(np.abs(before[name]).reshape(-1), round(share * weight.size)).reshape(weight.shape)
        assert np.array_equal(weight, np.where(gone, 0, before[name]))
    zero_weights(whole, "magnitude-global", share, None, {})
    every = np.concatenate([weight.reshape(-1) for weight in before.values()])
    found = np.concatenate([weight.reshape(-1) for weight in matrices(whole).values()])
    assert np.array_equal(found, np.where(smallest_of(np.abs(every), round(share * every.size)), 0, every))
    assert zeros_of(whole) == (round(share * every.size), every.size)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_pattern_holds_in_every_row(method):
    model = llama()
    squares = collect(model, IDS) if method == "wanda" else {}
    zero_weights(model, method, 0.5, Pattern(2, 4), squares)
    for weight in matrices(model).values():
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_a_pattern_that_does_not_divide_is_refused():
    with pytest.raises(ModelError, match="no multiple of 7"):
        zero_weights(llama(), "magnitude", 0.5, Pattern(3, 7), {})


def test_embeddings_head_and_norms_stay():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero_weights(model, "magnitude-global", 0.5, None, {})
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in body_of(model)}
    assert not any("lm_head" in name or "embed" in name or "norm" in name for name in changed)
