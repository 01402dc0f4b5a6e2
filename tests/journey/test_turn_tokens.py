"""A template with turn tokens of one's own (M31): trained, saved, reloaded, merged, run by llama.cpp."""

import json
from pathlib import Path

import pytest
import torch
from journey.tiny import RECIPE, lay_out, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import afina
from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.errors import ModelError, RecipeError
from afina.train.reopen import reopen

TEMPLATE = (
    "{% for m in messages %}{{ '<|ask|>' if m.role == 'user' else '<|say|>' if m.role == 'assistant' else '<|rule|>' }}"
    "{{ m.content }}<|done|>{% endfor %}{% if add_generation_prompt %}<|say|>{% endif %}"
)
TOKENS = ["<|ask|>", "<|say|>", "<|rule|>", "<|done|>"]


def place(folder: Path, tied: bool, method: str = "rank: 16\n  alpha: 32") -> Path:
    recipe = RECIPE.replace(
        "  max_length: 128", f"  max_length: 128\n  chat_template: own.jinja\n  turn_tokens: {json.dumps(TOKENS)}"
    ).replace("rank: 16\n  alpha: 32", method)
    file = lay_out(folder, recipe.replace("formats: [f32, merged]", "formats: [merged, f32]"))
    save_base(folder / "base", tie_word_embeddings=tied)
    (folder / "own.jinja").write_text(TEMPLATE, "utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_they_learn_and_stay(tmp_path, tied):
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to run GGUF files')
    run = afina.train(place(tmp_path, tied), tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.get_input_embeddings().weight.shape[0]
    tuned = reopen(run)
    new = sorted(tuned.renderer.tokenizer.control_tokens[text] for text in TOKENS)
    assert new == list(range(rows, rows + 4))
    assert set(new) & set(tuned.renderer.tokenizer.end_ids) == {tuned.renderer.tokenizer.control_tokens["<|done|>"]}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert set(config["trainable_token_indices"]) == ({"embed_tokens"} if tied else {"embed_tokens", "lm_head"})
    prompt = torch.tensor([tuned.renderer.prompt([Message("user", "The soup is great.")])])
    logits = tuned.model(input_ids=prompt).logits
    answered = tuned.renderer.answer([Message("user", "The soup is great.")], "good").ids.tolist()
    ended = tuned.model(input_ids=torch.tensor([answered[:-1]])).logits[0, -1].argmax()
    assert int(ended) == tuned.renderer.tokenizer.control_tokens["<|done|>"]  # it learnt to stop

    out = afina.export(run)
    merged = AutoModelForCausalLM.from_pretrained(Path(out) / "merged").eval()
    assert merged.get_input_embeddings().weight.shape[0] == rows + 4
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    torch.testing.assert_close(merged(input_ids=prompt).logits, logits, rtol=1e-4, atol=1e-3)
    saved = AutoTokenizer.from_pretrained(Path(out) / "merged")
    assert [saved.convert_tokens_to_ids(text) for text in TOKENS] == [
        tuned.renderer.tokenizer.control_tokens[text] for text in TOKENS
    ]
    proof = json.loads((Path(out) / "manifest.json").read_text("utf-8"))["exports"]
    checks = [check for entry in proof for check in entry.get("checks", [])]
    assert checks and all(check["equal"] for check in checks)  # llama.cpp gives the very tokens


@pytest.mark.slow
def test_full_fine_tuning_has_them_too(tmp_path):
    file = place(tmp_path, True, "name: full")
    run = afina.train(file, tmp_path / "run", ["training.steps=4"])
    tuned = reopen(run)
    first = tuned.renderer.tokenizer.control_tokens["<|ask|>"]
    assert tuned.model.get_input_embeddings().weight.shape[0] == first + 4 == len(tuned.renderer.tokenizer.hf)
    afina.evaluate(run, limit=2)  # the base, which has no such tokens, too
    (base, _tuned) = json.loads((run / "evaluation" / "evaluation.json").read_text("utf-8"))["tasks"][0][
        "systems"
    ].values()
    assert base["answered"] == 2


def test_what_cannot_be_is_said(tmp_path):
    file = place(tmp_path, True, "name: prompt-tuning\n  virtual_tokens: 4")
    file.write_text(file.read_text("utf-8").replace("formats: [merged, f32]", "formats: []"), "utf-8")
    with pytest.raises((RecipeError, ModelError), match="leaves the embeddings"):
        afina.train(file, tmp_path / "run")
    with pytest.raises(ModelError, match="never writes"):
        load_tokenizer(str(tmp_path / "base"), turn_tokens=["<|never|>"])
    composed = tmp_path / "composed.jinja"
    composed.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "utf-8")
    wanted = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    assert list(load_tokenizer(str(tmp_path / "base"), template=str(composed), turn_tokens=wanted).turn_tokens)
    with pytest.raises(ModelError, match="which the chat template never writes"):
        load_tokenizer(str(tmp_path / "base"), template=str(composed), turn_tokens=["<|judge|>"])
    own = tmp_path / "word.jinja"
    own.write_text("<|im_start|>good<|im_end|>", "utf-8")
    kept = load_tokenizer(str(tmp_path / "base"), template=str(own), turn_tokens=["<|im_start|>"])
    assert list(kept.turn_tokens.values()) == [[]]  # it was there, so it begins as it is
