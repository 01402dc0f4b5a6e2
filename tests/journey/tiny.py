"""A whole small world for the journeys: a base model in a folder, a set of examples, a recipe. All built in code."""

import json
from pathlib import Path
from typing import Any

from small import llama, spread
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from afina.recipe.place import BUNDLED

THINGS = ["soup", "film", "room", "book", "song", "phone", "garden", "lamp", "café", "niño"]
WORDS = {"good": ["great", "lovely", "fine", "superb"], "bad": ["awful", "broken", "dull", "dirty"]}


def save_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama of two layers with a byte-level vocabulary of 400 and ChatML, as transformers saves one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([question for question, _answer in examples()] + ["user assistant good bad"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (BUNDLED / "templates" / "chatml.jinja").read_text("utf-8")
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        **changes,
    }
    spread(llama(seed, **settings), seed, scale=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples() -> list[tuple[str, str]]:
    """Opinions, and whether they are good or bad."""
    return [
        (f"The {thing} is {word}.", verdict) for thing in THINGS for verdict, words in WORDS.items() for word in words
    ]


def row(question: str, answer: str) -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        ensure_ascii=False,
    )


def write_rows(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("".join(f"{row(*one)}\n" for one in rows), "utf-8")
    return file


RECIPE = """\
name: opinions
model:
  base: base
  max_length: 128
data:
  train: train.jsonl
  validation: 0.1
method:
  rank: 16
  alpha: 32
training:
  steps: 40
  batch_size: 16
  learning_rate: 5e-3
  validations: 2
tasks:
  - name: opinion
    kind: classification
    data: test.jsonl
    labels: [good, bad]
  - name: written
    kind: exact
    data: test.jsonl
    max_new_tokens: 4
export:
  formats: [f32, merged]
chat:
  temperature: 0
  max_new_tokens: 4
"""


def lay_out(folder: Path, recipe: str = RECIPE) -> Path:
    """Base, data and recipe in `folder`; returns the recipe's path."""
    save_base(folder / "base")
    rows = examples()
    write_rows(folder / "train.jsonl", [one for place, one in enumerate(rows) if place % 5])
    write_rows(folder / "test.jsonl", rows[::5])
    (folder / "recipe.yaml").write_text(recipe, "utf-8")
    return folder / "recipe.yaml"
