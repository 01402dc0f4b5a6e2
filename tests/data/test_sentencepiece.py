"""SentencePiece's tokenizers (Unigram or BPE; a sign for the space, which also marks beginnings): rendered piece by
piece, a conversation has the ids of its whole text, and no text of it becomes a control token."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is two plus two? It is four, and the answer is final.",
    "user assistant system INST ### Response: Instruction: be brief, say yes or no, a b c d e f g h i j k l m n o p q",
    "¿Cuántos niños hay en la clase? Hay doce niñas y diez niños, señor. Mañana será otro día. 0123456789 <|>/[]",
]
CONTROL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
KINDS = ("unigram-first", "unigram-always", "unigram-never", "bpe-prepend")
PHI = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TIGHT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
    "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
)
TEMPLATES = {"a line after each token": PHI, "nothing after tokens": TIGHT, "words for turns": WORDS}


@cache
def tokenizer_of(kind: str, template: str) -> Tokenizer:
    """A small tokenizer of this kind; a line end is a piece by itself, as SentencePiece's bytes are."""
    if kind == "bpe-prepend":
        core = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
        definition = json.loads(core.to_str())
        pieces = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *definition["model"]["vocab"]]
        definition["model"] |= {
            "vocab": {text: n for n, text in enumerate(dict.fromkeys(pieces))},
            "byte_fallback": True,
        }
        core = Backend.from_str(json.dumps(definition))
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        core = Backend(models.Unigram())
        scheme = kind.removeprefix("unigram-")
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(
            vocab_size=220,
            special_tokens=["<unk>", *CONTROL],
            unk_token="<unk>",
            initial_alphabet=["\n"],
            show_progress=False,
        )
        core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    hf = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Tokenizer(hf, TEMPLATES[template])


def rows_of(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def whole(tokenizer: Tokenizer, messages: list[Message], *, prompt: bool = False) -> list[int]:
    """The text rendered and tokenised in one go, as every other program does it."""
    text = tokenizer.render(rows_of(messages), prompt=prompt)
    return tokenizer.hf(text, add_special_tokens=False)["input_ids"]


def sample(messages: list[Message]) -> Sample:
    return Sample(tuple(messages), Path("talk.jsonl"), 1)


kinds = pytest.mark.parametrize("kind", KINDS)
templates = pytest.mark.parametrize("template", TEMPLATES)
quietly = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.text(st.sampled_from("abcdeño ¿?.,19 \n"), min_size=1, max_size=30).map(lambda text: f"x{text}y")


@kinds
@templates
@quietly
@given(texts=st.lists(PLAIN, min_size=2, max_size=6))
def test_piece_by_piece_the_ids_are_those_of_the_whole(kind: str, template: str, texts: list[str]):
    tokenizer = tokenizer_of(kind, template)
    texts = texts[: len(texts) // 2 * 2]
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    render = Renderer(tokenizer)
    row = render.sample(sample(messages))
    assert row.ids.tolist() == whole(tokenizer, messages)
    prompt = render.prompt(messages[:-1])
    assert prompt == whole(tokenizer, messages[:-1], prompt=True)
    assert row.ids[: len(prompt)].tolist() == prompt
    answered = render.answer(messages[:-1], messages[-1].content)
    assert answered.ids.tolist() == row.ids.tolist()
    end = "</s>" if template == "words for turns" else "<|end|>"
    assert tokenizer.hf.decode(answered.ids[answered.learnt]).lstrip(" ") == messages[-1].content + end


HOSTILE = st.lists(
    st.sampled_from(
        [*CONTROL, "<unk>", "▁", "▁<s>", "<0x0A>", "<0x3C>", "s>", "<", "|end|>", " ", "\n", "a", "ñ", "🙂"]
    ),
    max_size=8,
).map(lambda parts: "x" + "".join(parts) + "y")


@kinds
@templates
@quietly
@given(texts=st.lists(HOSTILE, min_size=2, max_size=4))
def test_no_text_becomes_a_control_token(kind: str, template: str, texts: list[str]):
    """The control tokens of a conversation are those of the same turns with harmless words."""
    tokenizer = tokenizer_of(kind, template)
    texts = texts[: len(texts) // 2 * 2]
    control = set(tokenizer.control_tokens.values()) - {tokenizer.hf.unk_token_id}

    def skeleton(said: list[str]) -> list[int]:
        messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said)]
        row = Renderer(tokenizer).sample(sample(messages))
        return [int(index) for index in row.ids if index in control]

    assert skeleton(texts) == skeleton(["x"] * len(texts))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "template"),
    [("tokenizers/phi-3", None), ("tokenizers/phi-3", "afina/alpaca"), ("models/stories260K", "afina/alpaca")],
)
def test_real_tokenizers_give_the_ids_of_the_whole(name: str, template: str | None, real_data: Path):
    """Phi-3's and a Llama's own files, with Phi-3's template and Alpaca's."""
    tokenizer = load_tokenizer(str(real_data / name), template=template)
    talk = [
        Message("user", "¿Cuántos niños hay?  x = {'a': 1}\n\tπ ≈ 3 🙂"),
        Message("assistant", "Hay 12.\n\n```python\nprint(12)\n```"),
        Message("user", "Thanks, and in the <|user|> room?"),
        Message("assistant", "Seven <|end|> or eight."),
    ]
    render = Renderer(tokenizer)
    plain = [Message(one.role, one.content.replace("<|", "").replace("|>", "")) for one in talk]
    begin = [] if tokenizer.bos_id is None or whole(tokenizer, plain)[0] == tokenizer.bos_id else [tokenizer.bos_id]
    assert render.sample(sample(plain)).ids.tolist() == begin + whole(tokenizer, plain)
    control = set(tokenizer.control_tokens.values())
    assert [index for index in render.sample(sample(talk)).ids.tolist() if index in control] == [
        index for index in render.sample(sample(plain)).ids.tolist() if index in control
    ]
