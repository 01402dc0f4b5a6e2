"""A byte-level BPE vocabulary for the tiny model, learnt from a sample of its own corpus.

Bytes and GPT-2's splitting rule, no normaliser: any text comes back as it went in. Digits are kept apart while
learning, so no merge joins two of them. Words weigh by the square root of their number, which gives a vocabulary of
stems and endings that rare words share, rather than of the generator's favourite words. Run as a program, it writes the
tokenizer's files.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from corpus import shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 3840
PAD, DOCUMENT, TURN, END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def evened(texts: Iterator[str]) -> Iterator[str]:
    """The words of `texts`, each as often as the square root of its number."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r" ?\w+| ?[^\w\s]+|\s+", re.sub(r"<\|\w+\|>", "\n", text)))
    for word, count in counts.items():
        yield from [word] * math.ceil(math.sqrt(count))


def learn(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """The tokenizer learnt from `texts`."""
    core = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, DOCUMENT, TURN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(evened(texts), trainer)
    core.pre_tokenizer = whole
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=DOCUMENT,
        eos_token=END,
        additional_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--real", type=Path, required=True, help="the folder that holds data/gsm8k and the rest")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--characters", type=int, default=24_000_000)
    given = arguments.parse_args()
    sample = (text for shard in shards(given.real, 1, given.characters) for text in shard)
    tokenizer = learn(sample)
    tokenizer.save_pretrained(given.out)
    print(f"{len(tokenizer)} tokens in {given.out}")


if __name__ == "__main__":
    main()
