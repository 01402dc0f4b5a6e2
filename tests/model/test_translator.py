"""Translation models of this machine, true architectures made small and taught a handful of phrases, and the whole verb
with them: what is protected stays byte for byte."""

import io
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    NllbTokenizer,
)

from afina import translation
from afina.data.translate import Job
from afina.errors import ModelError
from afina.model.load import choose_hardware
from afina.model.translator import Translator
from afina.recipe.schema import Model

spm = pytest.importorskip("sentencepiece", reason='install "afina[translate]" to translate with a model here')
PHRASES = {
    "What does": "¿Qué hace",
    "do?": "ahora?",
    "It adds one to a number.": "Suma uno a un número.",
    "See": "Mira",
    "for more.": "para saber más.",
    "The sum of": "La suma de",
    "is": "es",
    "a short text": "un texto corto",
}
TINY = dict(
    d_model=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_position_embeddings=64,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def learn(model: torch.nn.Module, batches: list, pad: int) -> None:
    """Until the phrases are known by heart."""
    for batch in batches:
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == pad, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _step in range(600):
        loss = sum(model(**batch).loss for batch in batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01 * len(batches):
            return
    raise AssertionError(f"the phrases were not learnt: {loss.item()}")


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English to Spanish: a Marian model with SentencePiece's own two models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("marian")
    pieces: list[str] = []
    for name, texts in (("source", list(PHRASES)), ("target", list(PHRASES.values()))):
        made = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20), model_writer=made, vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
        (folder / f"{name}.spm").write_bytes(made.getvalue())
        known = spm.SentencePieceProcessor(model_proto=made.getvalue())
        pieces += [known.id_to_piece(index) for index in range(known.get_piece_size())]
    inside = [piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(["</s>", "<unk>", *inside, "<pad>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    tokenizer = MarianTokenizer(*(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")))
    tokenizer.save_pretrained(folder)
    pad = vocabulary["<pad>"]
    ids = dict(pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, forced_eos_token_id=0)
    model = MarianMTModel(MarianConfig(vocab_size=len(vocabulary), **ids, **TINY))
    batch = tokenizer(list(PHRASES), text_target=list(PHRASES.values()), return_tensors="pt", padding=True)
    learn(model, [batch], pad)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English to Spanish and French: an NLLB model, told by the first token of its answer which."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nllb")
    said = {"Good morning": ("Buenos días", "Bonjour"), "is": ("es", "est")}
    core = Backend(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [*said, *(text for pair in said.values() for text in pair)]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False))
    bpe = json.loads(core.to_str())["model"]
    tokenizer = NllbTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.save_pretrained(folder)
    tokenizer.src_lang = "eng_Latn"
    batches = []
    for place, code in enumerate(("spa_Latn", "fra_Latn")):
        tokenizer.tgt_lang = code
        targets = [pair[place] for pair in said.values()]
        batch = tokenizer(list(said), text_target=targets, return_tensors="pt", padding=True)
        begin = torch.full((len(said), 1), tokenizer.eos_token_id)
        batch["decoder_input_ids"] = torch.cat([begin, batch["labels"][:, :-1]], 1)
        batch["labels"][:, 0] = -100  # which language it shall be, the model is told
        batches.append(batch)
    end = tokenizer.eos_token_id
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=end, bos_token_id=0, decoder_start_token_id=end)
    model = M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=len(tokenizer), encoder_layerdrop=0.0, decoder_layerdrop=0.0, **ids, **TINY)
    )
    learn(model, batches, tokenizer.pad_token_id)
    model.eval().save_pretrained(folder)
    return folder


def translator(folder: Path, target: str, source: str = "en") -> Translator:
    return Translator(str(folder), choose_hardware(Model()), source, target)


def test_a_marian_model_and_what_is_too_long_for_it(marian: Path):
    here = translator(marian, "es")
    assert here(list(PHRASES)) == list(PHRASES.values())
    assert here(["See " * 90, "See"]) == [None, "Mira"]
    assert here(["See " * 90]) == [None]


def test_a_model_of_many_languages_is_told_which(nllb: Path):
    assert translator(nllb, "es")(["Good morning", "is"]) == ["Buenos días", "es"]
    assert translator(nllb, "fra_Latn", "eng_Latn")(["Good morning", "is"]) == ["Bonjour", "est"]
    for target, source in (("xx", "en"), ("es", "xx")):
        with pytest.raises(ModelError, match="does not know the language xx") as raised:
            translator(nllb, target, source)
        assert raised.value.hint


def test_a_folder_that_is_no_translation_model(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be loaded as a translation model"):
        translator(tmp_path, "es")


ROWS = [
    [
        "What does `f(x)` do?\n\n```python\nis = 1  # See for more.\n```\n\nSee https://arxiv.org/a?b=is for more.",
        "It adds one to a number.\n\n$$is + 1$$\n\nThe sum of $x_1$ is $x_2$",
    ],
    ["a short text", '{"is": "a short text", "n": [1, "See"], "url": "https://arxiv.org/is"}'],
    ["a short text", "See " * 90],
]


def test_the_whole_verb_with_a_model_here(marian: Path, tmp_path: Path):
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "weight": 0.5}]}
        for asked, answer in ROWS
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "rows.es.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    job = Job("en", "es", f"here {marian}")
    translation.translate(str(source), out, job, (None, str(marian), ""))
    made = [json.loads(line)["messages"] for line in out.read_text("utf-8").splitlines()]
    assert [[message["content"] for message in messages] for messages in made] == [
        [
            "¿Qué hace `f(x)` ahora?\n\n```python\nis = 1  # See for more.\n```\n\n"
            "Mira https://arxiv.org/a?b=is para saber más.",
            "Suma uno a un número.\n\n$$is + 1$$\n\nLa suma de $x_1$ es $x_2$",
        ],
        ["un texto corto", '{"is": "un texto corto", "n": [1, "See"], "url": "https://arxiv.org/is"}'],
    ]
    assert all(messages[1]["weight"] == 0.5 for messages in made)
    (kept,) = [json.loads(line) for line in (tmp_path / "rows.es.kept-back.jsonl").read_text("utf-8").splitlines()]
    assert kept["line"] == 3
    before = out.read_bytes()
    out.unlink()
    translation.translate(str(source), out, job, (None, str(marian), ""))
    assert out.read_bytes() == before
