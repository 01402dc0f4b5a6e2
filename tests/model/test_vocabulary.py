"""Tied embeddings, added tokens and resized vocabularies survive every save and merge, and padding is never learnt."""

import copy

import pytest
import torch
from families import build
from small import CPU, loud_llama
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from afina.data.load_tokenizer import load_tokenizer
from afina.data.tokenizer import Tokenizer
from afina.model.attach import attach, learning, merged
from afina.model.load import load_model
from afina.model.saved import load_adapter, save_adapter, save_whole
from afina.recipe.schema import Full, Lora

ADDED = ["<|think|>", "<|tool|>", "palabra"]
METHODS = {
    "adapters": Lora(rank=4),
    "adapters and embeddings": Lora(rank=4, modules_to_save=["embed_tokens", "lm_head"]),
    "full": Full(name="full"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, made):
    """A base with three tokens added and rows to spare, tied and not."""
    found = {}
    for tied in (True, False):
        place = tmp_path_factory.mktemp("base")
        made.save_pretrained(place)
        model = loud_llama()
        model.resize_token_embeddings(len(made) + 5)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(place)
        found[tied] = place
    return found


@pytest.fixture(scope="module")
def made():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["hola hola"], trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    hf.add_tokens([AddedToken(text, special=text.startswith("<")) for text in ADDED])
    return hf


def trained(model: nn.Module, ids: torch.Tensor) -> nn.Module:
    """A few steps, so that everything that learns has moved."""
    optimizer = torch.optim.SGD([parameter for _name, parameter in learning(model)], lr=0.5)
    for _step in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_vocabulary_survives(folders, tmp_path, tied, method):
    folder = folders[tied]
    tokenizer = load_tokenizer(str(folder), template="afina/chatml")
    ids = torch.tensor([tokenizer.hf("<|think|>hola palabra<|tool|>")["input_ids"]])
    assert {ids[0, 0].item(), ids[0, -1].item()} == {
        tokenizer.hf.convert_tokens_to_ids(ADDED[place]) for place in (0, 1)
    }
    rows = len(tokenizer.hf) + 5
    model = trained(attach(load_model(str(folder), CPU), method, seed=0), ids)
    with torch.inference_mode():
        before, origin = model(input_ids=ids).logits, load_model(str(folder), CPU)(input_ids=ids).logits
    assert before.shape[-1] == rows and (before - origin).abs().max() > 1e-3
    save_adapter(model, tmp_path / "adapter", base="x")
    tokenizer.save(tmp_path / "adapter")

    def opened() -> nn.Module:
        if method.name == "full":
            return load_model(str(tmp_path / "adapter"), CPU)
        return load_adapter(load_model(str(folder), CPU), tmp_path / "adapter")

    again = opened()
    save_whole(merged(opened()), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for found in (again, load_model(str(tmp_path / "merged"), CPU), plain):
        with torch.inference_mode():
            torch.testing.assert_close(found(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert embedding.shape[0] == head.shape[0] == plain.config.vocab_size == rows
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert saved("<|think|>hola palabra<|tool|>")["input_ids"] == ids[0].tolist()
    assert len(saved) == len(tokenizer.hf)


@pytest.mark.parametrize(
    "pad, more, expected",
    [
        (None, [], 1),
        ("<|end|>", [], 1),
        ("<|end|>", ["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (None, ["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        ("palabra", ["<|finetune_right_pad_id|>"], "palabra"),
    ],
    ids=["none", "the end", "a spare one", "Llama 3", "its own"],
)
def test_padding_is_never_what_ends_an_answer(made, pad, more, expected):
    """Phi-2 has no padding; Llama 3's scripts pad with the end of turn, and whoever masks padding never learns it."""
    hf = copy.deepcopy(made)
    hf.pad_token = pad
    hf.add_tokens([AddedToken(text, special=True) for text in more])
    tokenizer = Tokenizer(hf, None)
    wanted = hf.convert_tokens_to_ids(expected) if isinstance(expected, str) else expected
    assert tokenizer.pad_id == wanted and tokenizer.pad_id not in tokenizer.end_ids


def test_a_head_with_a_bias_keeps_it(tmp_path):
    """Phi-2's: learning a row of it, loaded again, switched off and merged it adds what the base's head adds."""
    build("phi2").save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), CPU)
    assert base.lm_head.bias.abs().max() > 0.05
    ids = torch.tensor([[3, 40, 5, 97, 7, 98]])
    model = attach(load_model(str(tmp_path / "base"), CPU), Lora(rank=4), seed=0, tokens={97: [3, 4], 98: [5]})
    with torch.inference_mode():
        # Nothing has learnt yet: known tokens are the base's.
        torch.testing.assert_close(model(ids[:, :3]).logits[..., :97], base(ids[:, :3]).logits)
    trained_model = trained(model, ids)
    with torch.inference_mode():
        tuned = trained_model(ids).logits
        with trained_model.disable_adapter():
            torch.testing.assert_close(trained_model(ids[:, :3]).logits[..., :97], base(ids[:, :3]).logits)
    save_adapter(trained_model, tmp_path / "adapter", "base")
    again = load_adapter(load_model(str(tmp_path / "base"), CPU), tmp_path / "adapter")
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, tuned)
        torch.testing.assert_close(merged(again)(ids).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "qwen2"])
def test_a_head_that_is_the_embedding_learns_under_either_name(tmp_path, family):
    """PEFT writes such a head once or twice, whatever the embedding is called: it is loaded again all the same."""
    build(family).save_pretrained(tmp_path / "base")
    ids = torch.tensor([[3, 40, 5, 9, 7, 2]])
    embedding = {"gpt2": "wte", "falcon": "word_embeddings", "qwen2": "embed_tokens"}[family]
    for place, modules in enumerate((["lm_head"], [embedding], [embedding, "lm_head"])):
        method = Lora(rank=2, modules_to_save=modules)
        model = trained(attach(load_model(str(tmp_path / "base"), CPU), method, seed=0), ids)
        save_adapter(model, tmp_path / str(place), "base")
        again = load_adapter(load_model(str(tmp_path / "base"), CPU), tmp_path / str(place))
        with torch.inference_mode():
            base = load_model(str(tmp_path / "base"), CPU)(ids).logits
            torch.testing.assert_close(again(ids).logits, model(ids).logits)
            assert (model(ids).logits - base).abs().max() > 0.1
            torch.testing.assert_close(merged(again)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
