"""Names, patterns and numbers of a recipe against the layers there are."""

import pytest
from small import llama

from afina.errors import RecipeError
from afina.model.attach import attach, learning
from afina.recipe.schema import Full, Lora


def adapted(**method) -> set[str]:
    """Where adapters lie, as layer.module."""
    names = [name for name, _p in learning(attach(llama(num_hidden_layers=3), Lora(rank=2, **method), seed=0))]
    return {name.split(".layers.")[1].split(".lora_")[0] for name in names if "lora_A" in name}


ALL = {
    f"{layer}.{part}"
    for layer in range(3)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
}


@pytest.mark.parametrize(
    "method, found",
    [
        (dict(), ALL),
        (dict(targets=["*"]), ALL),
        (dict(targets=["[qv]_proj"]), {name for name in ALL if name[-6:] in ("q_proj", "v_proj")}),
        (dict(targets=["*.mlp.*"]), {name for name in ALL if ".mlp." in name}),
        (dict(targets=["layers.0.*", "self_attn.q_proj"][:1]), {name for name in ALL if name[0] == "0"}),
        (dict(targets=["model.layers.2.mlp.up_proj"]), {"2.mlp.up_proj"}),
        (dict(layers=[-1]), {name for name in ALL if name[0] == "2"}),
        (dict(layers=[0, -3, 2], targets=["q_proj"]), {"0.self_attn.q_proj", "2.self_attn.q_proj"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_a_recipe_means(method, found):
    assert adapted(**method) == found


@pytest.mark.parametrize(
    "method, key, told",
    [
        (dict(targets=["qproj"]), ("method", "targets", 0), "qproj"),
        (dict(targets=["q_proj", "*.nothing"]), ("method", "targets", 1), r"\*.nothing"),
        (dict(targets=["q_proj", "*.self_attn.*"]), ("method", "targets", 1), "both match"),
        (dict(targets=["proj"]), ("method", "targets", 0), "proj"),
        (dict(layers=[3]), ("method", "layers"), "from 0 to 2"),
        (dict(layers=[-4]), ("method", "layers"), "no layer -4"),
        (dict(layers=[1], targets=["layers.0.*"]), ("method", "layers"), "none of the targets"),
        (dict(modules_to_save=["lm_head", "norms"]), ("method", "modules_to_save", 1), "norms"),
        (dict(init="loftq"), ("method", "init"), "not quantised"),
    ],
    ids=str,
)
def test_what_there_is_not_is_told_with_its_key(method, key, told):
    with pytest.raises(RecipeError, match=told) as caught:
        adapted(**method)
    assert caught.value.key == key


def test_a_rank_is_at_most_the_narrow_side():
    assert adapted(targets=["k_proj"]) and len(learning(attach(llama(), Lora(rank=16), seed=0))) == 28
    with pytest.raises(RecipeError, match=r"rank is 17.*k_proj is only 16 wide"):
        attach(llama(), Lora(rank=17), seed=0)
    assert attach(llama(), Lora(rank=32, targets=["q_proj"]), seed=0)


def test_chosen_layers_learn_and_no_others():
    model = attach(llama(num_hidden_layers=3).bfloat16(), Full(name="full", layers=[-1]), seed=0)
    assert {name.split(".")[2] for name, _parameter in learning(model)} == {"2"}
    assert {str(parameter.dtype) for _name, parameter in learning(model)} == {"torch.float32"}
    assert str(model.lm_head.weight.dtype) == "torch.bfloat16"
