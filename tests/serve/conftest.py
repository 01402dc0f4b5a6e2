"""A small real Llama with a byte-level vocabulary of its own and ChatML, and its LoRA with B perturbed."""

import pytest
from peft import LoraConfig, get_peft_model
from small import loud_llama, perturb_adapters
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.recipe.place import BUNDLED

TEXTS = [
    "¿Qué es una función? Una función da a cada número otro número.",
    "user assistant system\nYou answer in one word. What is a loop? A loop repeats.",
    *(f"The tutor says {n} times {n} is {n * n}, wasn't it?" for n in range(60)),
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return Tokenizer(hf, (BUNDLED / "templates" / "chatml.jinja").read_text("utf-8"))


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def base() -> nn.Module:
    return loud_llama()


@pytest.fixture
def tuned() -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return perturb_adapters(get_peft_model(loud_llama(), config)).eval()
