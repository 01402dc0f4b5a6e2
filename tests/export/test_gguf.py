"""What is written is what transformers has: in real llama.cpp the same ids, tokens and log-probabilities."""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from afina.data import splits
from afina.data.load_tokenizer import load_tokenizer
from afina.errors import ModelError, OutputError
from afina.export import families, gguf, gguf_vocab
from afina.export.beforehand import check_exportable
from afina.export.certificate import EIGHT
from afina.export.gguf import write_gguf
from afina.model.llamacpp import LlamaCpp

pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to compare with real llama.cpp')

TEXTS = [
    "",
    "Hello, world!",
    "  two spaces before, two after  ",
    " ",
    "     ",
    "\n",
    "\n\n\t\r\n x\n",
    "don't DON'T we'll I'M he'd 'tis",
    "1 22 333 4444 55555 3.14159 ١٢٣ ½ ²",
    "El niño pingüino: ¿qué? ¡Añadió 3 €!",
    "日本語のテキスト、한국어, العربية",
    "🙂👩‍👩‍👧‍👦🇪🇸 emoji",
    "x = [i**2 for i in range(10)]  # code\n\tif x:\n        return {'a': 1}",
    "a<b && c>d </s",
    "under_score CamelCase kebab-case",
    "e\u0301 combining, \u200b zero width, \ufeff bom, \u00a0 nbsp",
    "\u2581 lower one eighth block",
    "<0x0A> [PAD512] <unk>",
    "<s>Once</s><s> upon",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "look <tool>up</tool> it",
    "A" * 300,
    "z q\x00\x01\x7f control characters",
]
CORPUS = [*TEXTS, *(f"the tutor said {i} times {i * i} that the pupil was right, wasn't he? " for i in range(200))]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLITS: dict[str, Any] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: split_by(splits.LLAMA3_SPLIT),
    "smaug-bpe": lambda: split_by(splits.LLAMA3_SPLIT),
    "qwen2": lambda: split_by(splits.QWEN2_SPLIT),
    "gpt-4o": lambda: split_by(splits.O200K_SPLIT),
}


def split_by(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(folder: Path, split: str = "gpt-2") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's control tokens and a token of the user's, trained on the odd texts."""
    backend = Backend(models.BPE(ignore_merges=split == "llama-bpe"))
    backend.pre_tokenizer = SPLITS[split]()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


BASE = dict(
    vocab_size=496,  # more rows than tokens
    hidden_size=256,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
PHI_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
ROPE = dict(rope_theta=5000.0, original_max_position_embeddings=32)
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**BASE),
    "llama, tied": lambda: LlamaConfig(**BASE | {"tie_word_embeddings": True}),
    "llama, no grouping": lambda: LlamaConfig(**BASE | {"num_key_value_heads": 8}),
    "llama, wide heads": lambda: LlamaConfig(**BASE, head_dim=48),
    "llama, biases": lambda: LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama, theta": lambda: LlamaConfig(**BASE, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, llama3": lambda: LlamaConfig(
        **BASE,
        rope_parameters=ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama, linear": lambda: LlamaConfig(
        **BASE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama, yarn": lambda: LlamaConfig(**BASE, rope_parameters=ROPE | {"rope_type": "yarn", "factor": 8.0}),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=128),
    "qwen2": lambda: Qwen2Config(**BASE),
    "qwen2, tied": lambda: Qwen2Config(**BASE | {"tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=64),
    "qwen3, yarn": lambda: Qwen3Config(
        **BASE, head_dim=64, rope_parameters=ROPE | {"rope_type": "yarn", "factor": 8.0}
    ),
    "phi2": lambda: PhiConfig(
        **BASE | {"rms_norm_eps": None}, layer_norm_eps=1e-5, rope_parameters=PHI_ROPE | {"partial_rotary_factor": 0.5}
    ),
    "phi3": lambda: Phi3Config(**BASE, rope_parameters=PHI_ROPE),
    "phi3, part turned": lambda: Phi3Config(**BASE, rope_parameters=PHI_ROPE | {"partial_rotary_factor": 0.75}),
    "phi3, longrope": lambda: Phi3Config(
        **BASE | {"max_position_embeddings": 1024},
        original_max_position_embeddings=256,
        rope_parameters=PHI_ROPE
        | {
            "rope_type": "longrope",
            "original_max_position_embeddings": 256,
            "long_factor": [1.0 + i / 4 for i in range(16)],
            "short_factor": [1.0 + i / 40 for i in range(16)],
        },
    ),
    "phi4-mini": lambda: Phi3Config(
        **BASE | {"tie_word_embeddings": True},
        original_max_position_embeddings=256,
        rope_parameters=PHI_ROPE
        | {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            "long_factor": [1.0 + i / 3 for i in range(12)],
            "short_factor": [1.0 + i / 30 for i in range(12)],
        },
    ),
    "gemma2": lambda: Gemma2Config(
        **BASE | {"tie_word_embeddings": True, "num_hidden_layers": 4, "num_key_value_heads": 4},
        head_dim=48,
        query_pre_attn_scalar=48,
        sliding_window=32,
    ),
    "gpt-oss": lambda: GptOssConfig(
        **BASE | {"num_hidden_layers": 4, "intermediate_size": 96},
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=32,
        rope_parameters=ROPE
        | {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    ),
}


CONFIGS |= {
    "gpt-oss, published rope": lambda: GptOssConfig(
        **CONFIGS["gpt-oss"]().to_dict()
        | {
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 4096,
            },
        }
    ),
    "gpt-oss, one layer": lambda: GptOssConfig(
        **CONFIGS["gpt-oss"]().to_dict() | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    ),
}
LONGROPE = ("phi3, longrope", "phi4-mini")
GELU = {"phi2", "gemma2"}
"""llama.cpp looks GELU up in a table of F16."""


def random_model(name: str, seed: int = 0) -> Any:
    """A model whose outputs vary: large random matrices, norms and biases off their usual ones and zeros."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
            else:
                parameter.copy_(noise * 0.2 + (0 if key.endswith("bias") else 1))
    return model


def make(folder: Path, name: str = "llama", **saving: Any) -> Any:
    """Save a random model and a trained tokenizer; returns the model."""
    model = random_model(name)
    model.save_pretrained(folder, **saving)
    byte_level(folder)
    return model


def teacher_forced(model: Any, ids: list[int]) -> np.ndarray:
    """(len(ids), vocab) natural log-probabilities of the next token, in fp32 by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.float(), -1).numpy()


def by_llamacpp(path: Path, ids: list[int], vocab: int, context: int = 4096) -> np.ndarray:
    """The same by real llama.cpp, keys and values in F32."""
    with LlamaCpp(path, threads=1, cache="f32", context=context) as model:
        found = model.logprobs(ids, top=vocab)
    array = np.full((len(ids), vocab), np.nan)
    for row, entries in zip(array, found, strict=True):
        row[list(entries)] = list(entries.values())
    return array


def kl(truth: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(positions,) KL(truth || other) in nats."""
    found: np.ndarray = (np.exp(truth) * (truth - other)).sum(-1)
    return found


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=count, attention_mask=torch.ones(1, len(ids))
    )
    return output[0, len(ids) :].tolist()


def some_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, 480, count).tolist()


# ---------------------------------------------------------------- a real pretrained model, to the character


@pytest.mark.real
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_stories_are_told_to_the_character(real_data: Path, tmp_path: Path, kind: Any) -> None:
    source = real_data / "models" / "stories260K"
    write_gguf(source, tmp_path / "stories.gguf", kind)
    with LlamaCpp(tmp_path / "stories.gguf", threads=1) as model:
        story = model.complete([1], max_new_tokens=200)
    expected = (source / "expected_stdout.txt").read_text("utf-8")
    assert len(story.ids) == 200
    assert story.text.removeprefix(" ") == expected.removesuffix("\n")


@pytest.mark.real
def test_eight_bits_tell_nearly_the_same(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "models" / "stories260K"
    facts = {kind: write_gguf(source, tmp_path / f"{kind}.gguf", kind) for kind in ("f32", "q8_0")}
    assert len(facts["q8_0"]["not_quantised"]) == 5  # rows of 172
    assert facts["q8_0"]["bytes"] < 0.4 * facts["f32"]["bytes"]
    with LlamaCpp(tmp_path / "f32.gguf", threads=1) as model:
        ids = [1, *model.complete([1], max_new_tokens=60).ids]
    exact, rough = (by_llamacpp(tmp_path / f"{kind}.gguf", ids, 512) for kind in ("f32", "q8_0"))
    divergence = (np.exp(exact) * (exact - rough)).sum(-1)
    assert 0 < divergence.mean() < 2e-3
    assert divergence.max() < 0.05


@pytest.mark.real
def test_stories_ids_equal(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "models" / "stories260K"
    facts = write_gguf(source, tmp_path / "stories.gguf", "f16")
    written, loaded = Backend.from_file(str(source / "tokenizer.json")), load_tokenizer(str(source))
    assert facts["tokenizer"] == {"model": "llama", "pre": "default"}
    assert len(facts["notes"]) == 1  # what transformers makes of it puts no space before a text that begins with one
    with LlamaCpp(tmp_path / "stories.gguf", threads=1) as model:
        for text in filter(None, TEXTS):
            written.encode_special_tokens = True
            assert model.tokenize(text, False) == written.encode(text, add_special_tokens=False).ids, text
            written.encode_special_tokens = False
            assert model.tokenize(text, True) == written.encode(text, add_special_tokens=False).ids, text
            assert model.tokenize(text, True, add_special=True) == written.encode(text).ids, text
            if not text.startswith((" ", "\u2581")):
                assert model.tokenize(text, False) == loaded.encode([text])[0], text


@pytest.mark.real
@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_real_vocabularies_give_equal_ids(real_data: Path, tmp_path: Path, name: str) -> None:
    """Real tokenizers of 50,000 and 32,000 tokens on a model with one tiny layer."""
    config = CONFIGS["llama"]()
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    config.update(size | {"vocab_size": len(tokenizer) + 7, "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in (real_data / "tokenizers" / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    loaded = load_tokenizer(str(tmp_path))
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        for text in filter(None, [*TEXTS, *(" " * n + "x" for n in range(1, 70, 3))]):
            if not (name == "phi-3" and "</s>" in text):  # no control token there, but always one in llama.cpp
                assert model.tokenize(text, False) == loaded.encode([text])[0], text
    assert len(facts["notes"]) == (1 if name == "phi-3" else 0)


@pytest.mark.real
def test_the_vocabulary_of_gpt_oss_gives_equal_ids(real_data: Path, tmp_path: Path) -> None:
    """The first 20,000 of its tokens, as its makers publish them, with its control tokens."""
    ranks = [line.split() for line in (real_data / "tokenizers/o200k_base.tiktoken").read_bytes().splitlines()[:20_000]]
    control = ["<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]

    class Published(TikTokenConverter):
        def load_tiktoken_bpe(self, tiktoken_url: str) -> Any:
            return {base64.b64decode(token): int(rank) for token, rank in ranks}

    published = Published("", splits.O200K_SPLIT, extra_special_tokens=control)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=published.converted(), eos_token="<|return|>")
    config = CONFIGS["llama"]()
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 4, "eos_token_id": 20_001}
    config.update(size | {"vocab_size": len(tokenizer), "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    assert facts["tokenizer"] == {"model": "gpt2", "pre": "gpt-4o"} and len(facts["notes"]) == 2
    loaded = load_tokenizer(str(tmp_path))
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        for text in filter(None, [*TEXTS, "HelloWORLD'S aÉb ÉCOLE ñanDÚ приВЕТ", "a/b\n/c //\r\n"]):
            assert model.tokenize(text, False) == loaded.encode([text])[0], text
        text = "<|start|>user<|message|>hi<|end|>"
        assert model.tokenize(text, True) == loaded.hf.encode(text)


# ---------------------------------------------------------------- tokenizers trained here


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_ids_and_template_equal(tmp_path: Path, split: str) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokenizer = byte_level(tmp_path, split)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    assert facts["tokenizer"] == {"model": "gpt2", "pre": split}
    loaded = load_tokenizer(str(tmp_path))
    assert (
        json.loads(loaded.hf.backend_tokenizer.to_str())["pre_tokenizer"]
        == json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    )
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        for text in TEXTS:
            assert model.tokenize(text, False) == loaded.encode([text])[0], text
            assert model.tokenize(text, True) == loaded.hf.encode(text, add_special_tokens=False), text
            assert model.tokenize(text, True, add_special=True) == loaded.hf.encode(text), text
        messages = [{"role": "user", "content": "¿Cuánto es 2+2?"}, {"role": "assistant", "content": "4"}]
        messages.append({"role": "user", "content": " why?\n"})
        assert model.apply_template(messages) == loaded.render(messages, prompt=True)


def test_control_tokens_only_where_asked(tmp_path: Path) -> None:
    make(tmp_path)
    write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        assert model.tokenize("<|im_end|>", True) == [2]
        assert 2 not in model.tokenize("<|im_end|>", False)
        assert model.tokenize("<tool>", False) == model.tokenize("<tool>", True) == [480]


def test_bos_is_added_when_the_tokenizer_adds_it(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    random_model("llama").save_pretrained(tmp_path)
    tokenizer = byte_level(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        assert model.tokenize("hi", True, add_special=True) == load_tokenizer(str(tmp_path)).hf("hi")["input_ids"]
        assert model.tokenize("hi", True, add_special=True)[0] == 1


def test_an_end_of_the_users_own_stops_llamacpp(tmp_path: Path) -> None:
    """An answer ends at a token of generation_config.json that llama.cpp cannot guess from its text."""
    model = random_model("llama")
    prompt, end = some_ids(9), 470
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = hidden
    model.generation_config.eos_token_id = [2, end]
    model.save_pretrained(tmp_path)
    byte_level(tmp_path)
    assert greedy(model, prompt, 5) == [end]
    write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as runner:
        answer = runner.complete(prompt, max_new_tokens=5)
    assert (answer.ids, answer.ended) == ([end], "end")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = make(tmp_path, name)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    assert facts["bytes"] == (tmp_path / "a.gguf").stat().st_size
    # Far beyond the windows of 32 and the 32 positions that scaled ones were trained for. llama.cpp chooses a table of
    # divisors by its context, not by the text; where it knows no window, the context is the window.
    count, context = {"mistral": (127, 4096), **dict.fromkeys(LONGROPE, (250, 256))}.get(name, (300, 4096))
    ids = some_ids(count)
    ours, theirs = by_llamacpp(tmp_path / "a.gguf", ids, 496, context), teacher_forced(model, ids)
    assert theirs.max(-1).std() > 0.1  # the outputs do vary
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert np.abs(ours - theirs).max() < (0.05 if name in GELU else 2e-3)
    assert np.abs(ours - theirs).mean() < (4e-3 if name in GELU else 3e-4)
    assert kl(theirs, ours).max() < (1e-3 if name in GELU else 1e-5)
    with LlamaCpp(tmp_path / "a.gguf", threads=1, cache="f32", context=context) as runner:
        assert runner.complete(ids[:11], max_new_tokens=24).ids == greedy(model, ids[:11], 24)


@pytest.mark.parametrize("name", LONGROPE)
def test_long_texts_have_the_long_divisors(tmp_path: Path, name: str) -> None:
    model = make(tmp_path, name)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    assert any("256" in note for note in facts["notes"])
    ids = some_ids(300)
    ours, theirs = by_llamacpp(tmp_path / "a.gguf", ids, 496, 512), teacher_forced(model, ids)
    assert kl(theirs, ours).max() < 1e-5


def test_gpt_oss_differs_by_the_rounded_ends_of_yarn_alone(tmp_path: Path) -> None:
    """Its published scaling of positions: what llama.cpp computes is the model whose ramp has rounded ends."""
    model, rope = make(tmp_path, "gpt-oss, published rope"), CONFIGS["gpt-oss, published rope"]().rope_parameters
    edit(tmp_path / "config.json", rope_parameters=rope | {"truncate": False})
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    assert not facts["exact"] and "by up to 0.022 radians" in facts["notes"][0]
    ids = some_ids(300)
    ours = by_llamacpp(tmp_path / "a.gguf", ids, 496)
    assert kl(teacher_forced(model, ids), ours).max() < 1e-5
    published = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    away = kl(teacher_forced(published, ids), ours)
    assert away[:16].max() < 1e-3 < away.mean() < EIGHT.divergence


def test_experts_in_mxfp4_differ_by_inputs_of_eight_bits_alone(tmp_path: Path, monkeypatch: Any) -> None:
    model = make(tmp_path, "gpt-oss, one layer")
    pack_experts(tmp_path, model)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    assert not facts["exact"] and any("8 bits" in note for note in facts["notes"])
    ids = some_ids(120)
    ours = by_llamacpp(tmp_path / "a.gguf", ids, 496)
    assert 1e-5 < kl(teacher_forced(model, ids), ours).mean() < EIGHT.divergence

    def eight_bits(x: torch.Tensor) -> torch.Tensor:
        """Q8_0, as llama.cpp rounds what it multiplies blocks with: 32 numbers share a scale in F16."""
        groups = x.unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        return (torch.round(groups / scale.clamp(min=1e-30)) * scale.half().float()).flatten(-2)

    def forward(self: Any, x: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor) -> Any:
        summed = torch.zeros_like(x)
        for expert in range(self.num_experts):
            rows, place = torch.where(router_indices == expert)
            gate_up = eight_bits(x)[rows] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
            out = eight_bits(self._apply_gate(gate_up)) @ self.down_proj[expert] + self.down_proj_bias[expert]
            summed.index_add_(0, rows, out * routing_weights[rows, place, None])
        return summed

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", forward)
    assert kl(teacher_forced(model, ids), ours).mean() < 1e-6


def pack_experts(folder: Path, model: Any) -> dict[str, np.ndarray]:
    """Store the experts of a gpt-oss folder as its makers do, in MXFP4, and give the model what these blocks mean.
    Returns ggml's own blocks of each projection, by GGUF name."""
    weights = load_file(folder / "model.safetensors")
    blocks: dict[str, np.ndarray] = {}
    kind = gguf_package.GGMLQuantizationType.MXFP4
    for name, parameter in model.named_parameters():
        if not name.endswith("_proj") or ".experts." not in name:
            continue
        stored = gguf_package.quants.quantize(parameter.detach().transpose(1, 2).contiguous().numpy(), kind)
        parameter.data = torch.from_numpy(gguf_package.quants.dequantize(stored, kind)).transpose(1, 2).contiguous()
        parts = torch.from_numpy(stored).unflatten(-1, (-1, 17))
        halves = torch.cat([parts[..., 1:] & 15, parts[..., 1:] >> 4], -1)  # the 32 weights in their order
        del weights[name]
        weights[f"{name}_blocks"] = halves[..., ::2] | halves[..., 1::2] << 4
        weights[f"{name}_scales"] = parts[..., 0].contiguous()
        place = f"blk.{name.split('.')[2]}.ffn_"
        if "gate_up" in name:
            blocks |= {f"{place}gate_exps.weight": stored[:, ::2], f"{place}up_exps.weight": stored[:, 1::2]}
        else:
            blocks[f"{place}down_exps.weight"] = stored
    save_file(weights, folder / "model.safetensors")
    return blocks


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_experts_in_mxfp4_keep_every_bit(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path, "gpt-oss")
    blocks = pack_experts(tmp_path, model)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", kind)
    found = read_tensors(tmp_path / "a.gguf")
    assert facts["types"]["mxfp4"] == len(blocks) == 12
    for name, stored in blocks.items():
        assert found[name].data.tobytes() == np.ascontiguousarray(stored).tobytes()
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    ids = some_ids(60)
    ours, theirs = by_llamacpp(tmp_path / "a.gguf", ids, 496), teacher_forced(model, ids)
    # llama.cpp multiplies what is in MXFP4 with inputs that it rounds to 8 bits
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() < (0.02 if kind == "f32" else 0.1)


def test_experts_in_floats_are_encoded(tmp_path: Path) -> None:
    """A merge that touched the experts leaves them in floats; llama.cpp's own encoder gives the same blocks."""
    make(tmp_path, "gpt-oss")
    weight = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2)
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "mxfp4")
    expected = gguf_package.quants.quantize(weight[:, 1::2].numpy(), gguf_package.GGMLQuantizationType.MXFP4)
    assert facts["types"]["mxfp4"] == 12
    assert read_tensors(tmp_path / "a.gguf")["blk.1.ffn_up_exps.weight"].data.tobytes() == expected.tobytes()


def test_gpt_oss_of_another_kind_is_refused(tmp_path: Path) -> None:
    random_model("gpt-oss").save_pretrained(tmp_path)
    byte_level(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for change in ({"swiglu_limit": 5.0}, {"layer_types": ["full_attention"] * 4}, {"tie_word_embeddings": True}):
        path.write_text(json.dumps(config | change), "utf-8")
        with pytest.raises(ModelError, match=next(iter(change))):
            check_exportable(tmp_path)
    path.write_text(json.dumps(config | {"rope_parameters": config["rope_parameters"] | {"truncate": False}}), "utf-8")
    assert any("YaRN" in note for note in families.read_shape(tmp_path).notes)


@pytest.mark.parametrize("change", ["rows", "theta", "epsilon", "norms"])
def test_the_comparison_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Mutations of the writer: each must break the agreement above."""
    model = make(tmp_path)
    if change == "rows":
        plain = dataclasses.replace(families.LLAMA, interleaved=())
        monkeypatch.setitem(families.FAMILIES, "LlamaForCausalLM", plain)
    elif change == "norms":
        convert = gguf._convert
        monkeypatch.setattr(
            gguf,
            "_convert",
            lambda tensor, plan, *rest: convert(tensor * (1 + 0.05 * ("attn_norm" in plan.name)), plan, *rest),
        )
    else:
        read = gguf.read_shape
        wrong = {"theta": 9000.0} if change == "theta" else {"epsilon": 1e-2}
        monkeypatch.setattr(gguf, "read_shape", lambda folder: dataclasses.replace(read(folder), **wrong))
    write_gguf(tmp_path, tmp_path / "a.gguf", "f32")
    ids = some_ids(40)
    ours, theirs = by_llamacpp(tmp_path / "a.gguf", ids, 496), teacher_forced(model, ids)
    assert np.abs(ours - theirs).max() > 1e-2


def test_interleave_is_a_permutation_within_heads() -> None:
    rows = torch.arange(12)
    assert gguf.interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.randn(12, 5)
    assert torch.equal(gguf.interleave(matrix, 2), matrix[gguf.interleave(rows, 2)])


def read_tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf_package.GGUFReader(path).tensors}


def test_storage_of_each_kind(tmp_path: Path) -> None:
    make(tmp_path, "qwen3")
    weights = load_file(tmp_path / "model.safetensors")
    names = {"blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight", "output_norm.weight": "model.norm.weight"}
    for kind, matrix in (("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")):
        facts = write_gguf(tmp_path, tmp_path / f"{kind}.gguf", kind)
        found = read_tensors(tmp_path / f"{kind}.gguf")
        assert len(found) == facts["tensors"] == len(weights)
        assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
        assert found["token_embd.weight"].tensor_type.name == matrix
        assert (
            found["output_norm.weight"].tensor_type.name == found["blk.0.attn_q_norm.weight"].tensor_type.name == "F32"
        )
        for name, source in names.items():
            tensor = found[name]
            expected = gguf_package.quants.quantize(weights[source].numpy(), tensor.tensor_type)
            assert tensor.data.tobytes() == expected.tobytes(), (kind, name)
        assert facts["not_quantised"] == []


def test_eight_bits_of_interleaved_rows(tmp_path: Path) -> None:
    make(tmp_path)
    write_gguf(tmp_path, tmp_path / "a.gguf", "q8_0")
    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    expected = gguf_package.quants.quantize(gguf.interleave(weight, 2).numpy(), gguf_package.GGMLQuantizationType.Q8_0)
    assert read_tensors(tmp_path / "a.gguf")["blk.0.attn_k.weight"].data.tobytes() == expected.tobytes()


def test_bf16_source_is_kept_exactly(tmp_path: Path) -> None:
    model = random_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    byte_level(tmp_path)
    for kind in ("f32", "f16"):
        write_gguf(tmp_path, tmp_path / f"{kind}.gguf", kind)
        stored = read_tensors(tmp_path / f"{kind}.gguf")["blk.0.attn_q.weight"].data
        weight = model.model.layers[0].self_attn.q_proj.weight.detach().float().numpy()
        assert (stored == weight.astype(stored.dtype)).all()
    ids = some_ids(30)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, theirs = by_llamacpp(tmp_path / "f32.gguf", ids, 496), teacher_forced(model, ids)
    assert np.abs(ours - theirs).max() < 2e-3


def test_shards_and_one_file_give_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "many", max_shard_size="500KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for folder in ("one", "many"):
        write_gguf(tmp_path / folder, tmp_path / f"{folder}.gguf", "f16", name="same")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_template_inside_the_tokenizers_configuration(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "inline {{ messages[0].content }}"}))
    write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        assert model.apply_template([{"role": "user", "content": "text"}]) == "inline text"


def test_sliding_window_becomes_the_context(tmp_path: Path) -> None:
    make(tmp_path, "mistral")
    facts = write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    assert any("128" in note for note in facts["notes"])
    with LlamaCpp(tmp_path / "a.gguf", threads=1, context=0) as model:
        assert model.context == 128
    field = gguf_package.GGUFReader(tmp_path / "a.gguf").get_field("llama.context_length")
    assert field is not None and field.contents() == 128


def test_a_name_with_phi3_loads(tmp_path: Path) -> None:
    make(tmp_path)
    assert write_gguf(tmp_path, tmp_path / "a.gguf", "f16", name="My Phi-3 tutor")["name"] == "My Phi 3 tutor"
    LlamaCpp(tmp_path / "a.gguf", threads=1).close()


# ---------------------------------------------------------------- what is refused, and what is left behind


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    make(tmp_path / "model")
    convert, count = gguf._convert, iter(range(100))

    def stop_at_five(tensor: Any, plan: Any, *rest: Any) -> Any:
        if next(count) == 5:
            raise error
        return convert(tensor, plan, *rest)

    monkeypatch.setattr(gguf, "_convert", stop_at_five)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        write_gguf(tmp_path / "model", tmp_path / "out" / "a.gguf", "f16")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.9}}, "attention_factor"),
    ],
)
def test_configurations_refused_before_training(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    make(tmp_path)
    check_exportable(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError, match=complaint):
        check_exportable(tmp_path)


def test_llama3_scaling_only_where_llamacpp_has_it(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    edit(tmp_path / "config.json", rope_parameters=CONFIGS["llama, llama3"]().rope_parameters)
    with pytest.raises(ModelError, match="llama3"):
        check_exportable(tmp_path)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        split_by(r"\w+|\W+"),
    ],
)
def test_unknown_pre_tokenizers_are_named(tmp_path: Path, pre_tokenizer: Any) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokenizer = byte_level(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pre_tokenizer") as caught:
        check_exportable(tmp_path)
    assert str(caught.value).count("ByteLevel")


@pytest.mark.parametrize(
    ("merges", "complaint"),
    [
        ([("t", "h"), ("th", "e")], None),
        ([("t", "h"), ("h", "e"), ("th", "e")], r"would merge 't' and 'he'"),
        ([("t", "h"), ("h", "e"), ("th", "e"), ("o", "e"), ("t", "he")], "'the' are not next to each other"),
        ([("t", "t"), ("tt", "t"), ("t", "tt"), ("tt", "tt"), ("ttt", "t"), ("t", "ttt")], None),
    ],
)
def test_merges_that_scores_cannot_say(tmp_path: Path, merges: Any, complaint: str | None) -> None:
    """llama.cpp ranks tokens where tokenizer.json ranks pairs: refused unless both mean the same."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"theo"]
    pieces += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    random_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    if complaint is not None:
        with pytest.raises(ModelError, match=complaint):
            check_exportable(tmp_path)
        return
    write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    loaded = load_tokenizer(str(tmp_path))
    with LlamaCpp(tmp_path / "a.gguf", threads=1) as model:
        for text in ("the thet ttt", *("t" * count for count in range(1, 40)), "ñ the\n"):
            assert model.tokenize(text, False) == loaded.encode([text])[0], text


def test_weights_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def written_with(**changes: torch.Tensor | None) -> None:
        changed = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(changed, path, metadata={"format": "pt"})
        try:
            write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
        finally:
            assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))

    for changes, complaint in (
        ({name: weights[name] * 1e6}, "too large for F16"),
        ({name: weights[name] * torch.nan}, "not a number"),
        ({name: None}, "lack the tensor"),
        ({name: weights[name][:-1].contiguous()}, "shape"),
        ({name: weights[name].to(torch.int8)}, "I8"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}, "lora_A"),
        ({"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:400].contiguous()}, "400 embeddings"),
    ):
        with pytest.raises(ModelError, match=complaint):
            written_with(**changes)


def test_foreign_folders_are_read_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, max_shard_size="500KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    edit(index, weight_map={"a": "../elsewhere.safetensors"})
    with pytest.raises(ModelError, match="outside its folder"):
        write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    edit(index, weight_map={"a": "absent.safetensors"})
    with pytest.raises(ModelError, match="cannot be read"):
        write_gguf(tmp_path, tmp_path / "a.gguf", "f16")
    index.write_text(whole)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="object"):
        check_exportable(tmp_path)
    monkeypatch.setattr(gguf_vocab, "MAX_JSON_BYTES", 2)
    with pytest.raises(ModelError, match="larger"):
        check_exportable(tmp_path)


# ---------------------------------------------------------------- the model that ships with the package

TINY = Path(gguf.__file__).parents[1] / "bundled" / "tiny"
QUESTIONS = [
    "Hello!",
    "What is 12 + 30?",
    "¿Cuánto es 7 x 8? Explícalo paso a paso.",
    "Write a Python function that adds two numbers.",
    "  I am so happy with this 🙂\n\nthank you ",
]


@pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="src/afina/bundled/tiny holds no weights")
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_tiny_answers_alike(tmp_path: Path, kind: Any) -> None:
    write_gguf(TINY, tmp_path / "tiny.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    loaded = load_tokenizer(str(TINY))
    with LlamaCpp(tmp_path / "tiny.gguf", threads=1) as runner:
        for question in QUESTIONS:
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            prompt = loaded.render(messages, prompt=True)
            assert runner.apply_template(messages) == prompt
            ids = loaded.hf.encode(prompt)
            assert runner.tokenize(prompt, True, add_special=True) == ids
            answer = runner.complete(ids, max_new_tokens=48)
            theirs = greedy(model, ids, 48)
            assert answer.ids == theirs, question
            assert answer.text == loaded.decode(theirs)
