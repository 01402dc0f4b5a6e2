import json
import signal
from pathlib import Path

import pytest
from data.byte_level import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.sandbox import without_clock
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import Interrupted, ModelError
from afina.recipe.place import BUNDLED

MARKUP = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<think>", "</think>"]
QWEN_LIKE = Tokenizer(
    build(eos="<|im_end|>", special=["<|im_start|>"], tags=["<think>", "</think>"], words=["  ", "COVID-19"]), None
)


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(MARKUP))).map("".join))
def test_any_text_comes_back_and_holds_no_markup(text):
    ids = QWEN_LIKE.encode([text], tags=False)[0]
    assert QWEN_LIKE.hf.decode(ids) == text
    assert not set(ids) & set(QWEN_LIKE.markup.values())
    with_tags = QWEN_LIKE.encode([text])[0]
    assert QWEN_LIKE.hf.decode(with_tags) == text
    assert not set(with_tags) & set(QWEN_LIKE.control_tokens.values())


def test_three_kinds_of_added_tokens():
    tags = {"<think>", "</think>"}
    assert QWEN_LIKE.markup.keys() - QWEN_LIKE.control_tokens.keys() == tags
    assert {"<|im_start|>", "<|im_end|>", "<|pad|>"} == set(QWEN_LIKE.control_tokens)
    words = [QWEN_LIKE.hf.convert_tokens_to_ids(word) for word in ("  ", "COVID-19")]
    ids = QWEN_LIKE.encode(["x  COVID-19"], tags=False)[0]
    assert ids[-2:] == words
    whole, tagged = QWEN_LIKE.encode(["The quick brown", "The quick brown<think>"], tags=False)
    assert tagged[: len(whole)] == whole  # read as text, not spelled out
    assert QWEN_LIKE.encode(["<think>"])[0] == [QWEN_LIKE.markup["<think>"]]


def test_order_and_repeats_are_kept():
    texts = ["b", "a", "b", "", "a"]
    assert QWEN_LIKE.encode(texts) == [QWEN_LIKE.encode([text])[0] for text in texts]
    assert QWEN_LIKE.encode([]) == []


def test_a_vocabulary_that_holds_a_control_token_as_a_word_is_spelled_out():
    core = Backend(
        models.WordLevel({"<unk>": 0, "</s>": 1, "hi": 2, "<": 3, "/": 4, "s": 5, ">": 6}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"), None)
    assert tokenizer.encode(["hi", "</s>"]) == [[2], [3, 4, 5, 6]]
    assert tokenizer.encode(["what"]) == [[0]]  # the unknown token is special too, and text may well be unknown


def test_a_pattern_that_never_ends_is_an_error_of_ours():
    """The Rust side panics, with an exception that is no Exception."""
    core = Backend(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"), None)
    with pytest.raises(ModelError, match="failed on a text"):
        tokenizer.encode(["a" * 64 + "b"])


def test_half_a_character_is_an_error_of_ours():
    with pytest.raises(ModelError, match="failed on a text"):
        QWEN_LIKE.encode(["\ud800"])


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_are_what_the_template_closes_an_answer_with(name, family):
    tokenizer = family(name)
    eos = tokenizer.hf.eos_token_id
    closing = {"google-gemma-2-2b-it": "<end_of_turn>", "microsoft-Phi-3.5-mini-instruct": "<|end|>"}.get(name)
    assert set(tokenizer.end_ids) == {eos, *([tokenizer.control_tokens[closing]] if closing else [])}


def test_ends_of_a_tuned_base():
    """A base whose end of sequence is another token than the one its new template closes a turn with."""
    hf = build(eos="<|endoftext|>", special=["<|im_start|>", "<|im_end|>"])
    chatml = (BUNDLED / "templates" / "chatml.jinja").read_text("utf-8")
    assert set(Tokenizer(hf, chatml).end_ids) == set(hf.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert Tokenizer(hf, None).end_ids == (hf.eos_token_id,)
    assert Tokenizer(hf, "{{ raise_exception('no') }}").end_ids == (hf.eos_token_id,)


def test_bos_only_where_the_tokenizer_puts_one():
    adds, does_not = Tokenizer(build(bos="<s>", adds_bos=True), None), Tokenizer(build(bos="<s>"), None)
    assert adds.bos_id == adds.hf.bos_token_id is not None
    assert does_not.bos_id is None
    assert adds.pad_id == adds.hf.pad_token_id


def test_names_that_templates_are_known_by(tmp_path: Path):
    QWEN_LIKE.hf.save_pretrained(tmp_path)
    own = tmp_path / "own.jinja"
    own.write_text("{{ strftime_now('%Y') }} {{ strftime_now( \"%d %b\" ) }} {{ messages[0].content }}", "utf-8")
    assert load_tokenizer(str(tmp_path)).template is None
    assert load_tokenizer(str(tmp_path), template="afina/plain").template.startswith("{%- for message")
    for template, folder in (("own.jinja", tmp_path), (str(own), Path("elsewhere"))):
        loaded = load_tokenizer(str(tmp_path), template=template, folder=folder)
        assert loaded.render([{"role": "user", "content": "x"}]) == "2024 26 Jul x"
        assert "strftime_now" not in loaded.template  # the template saved with a model shows one date to every program
    with pytest.raises(ModelError, match="cannot be read") as raised:
        load_tokenizer(str(tmp_path), template="afina/nothing")
    assert "afina/alpaca, afina/chatml, afina/plain" in raised.value.hint


def test_a_clock_that_cannot_be_stopped_in_the_text_stands_still_in_the_sandbox():
    text = "{% set how = '%Y' %}{{ strftime_now(how) }}"
    assert without_clock(text) == text
    assert Tokenizer(build(), text).render([{"role": "user", "content": "x"}]) == "2024"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, family):
    tokenizer = family("Qwen-Qwen3-0.6B")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    sample = Sample((Message("user", "¿Sí? <think>"), Message("assistant", "Sí.")), tmp_path, 1)
    assert loaded.template == tokenizer.template
    assert loaded.end_ids == tokenizer.end_ids
    assert Renderer(loaded).sample(sample).ids.tolist() == Renderer(tokenizer).sample(sample).ids.tolist()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"version": "1.0"}', b'{"model": {"type": "Odd"}}', b"\xff"]
)
def test_a_tokenizer_json_that_is_none(tmp_path: Path, content: bytes):
    QWEN_LIKE.hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be loaded|no tokenizer\.json|is refused") as raised:
        load_tokenizer(str(tmp_path))
    assert raised.value.hint


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    with pytest.raises(ModelError):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_real_vocabularies(name, real_data: Path):
    """The ids of real tokenizers, and of Phi-3 with its own template, to the last token."""
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    text = "¿Cuántos niños?  x = {'a': 1}\n\tπ ≈ 3 🙂"
    assert tokenizer.encode([text])[0] == tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    control = max(tokenizer.control_tokens, key=len)
    assert tokenizer.control_tokens[control] not in tokenizer.encode([control])[0]
    assert tokenizer.decode(tokenizer.encode([control])[0]).strip() == control


@pytest.mark.parametrize("what", ["load", "encode"])
def test_a_signal_is_no_fault_of_the_tokenizer(what):
    """One that comes while the library works is told as what it is, wherever it is raised."""
    tokenizer = load_tokenizer(str(BUNDLED / "tiny"))
    texts = [f"{number} is a number. " * 20 for number in range(300)]

    def handler(_number, _frame):
        raise Interrupted("Stopped.")

    before, stopped = signal.signal(signal.SIGALRM, handler), 0
    try:
        for delay in (0.005, 0.01, 0.02, 0.04, 0.08):
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                for _ in range(20):  # Python itself forgets what is raised while an object is taken down
                    load_tokenizer(str(BUNDLED / "tiny")) if what == "load" else tokenizer.encode(texts)
            except Interrupted:
                stopped += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stopped
