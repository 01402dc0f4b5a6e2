import re
from pathlib import Path

import numpy as np
import pytest
from data.byte_level import FAMILIES, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afina.data.audit.labels import audit
from afina.data.conversation import Message, Sample
from afina.data.problem import BadRows
from afina.data.template import MARK, Rendered, Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError, ModelError

families = pytest.mark.parametrize("name", FAMILIES)
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

ONE = (Message("user", "What is two plus two?"), Message("assistant", "It is four."))
WITH_SYSTEM = (Message("system", "You are brief."), *ONE)
TURNS = (
    Message("user", "What is two?"),
    Message("assistant", "It is two."),
    Message("user", "¿Y tres?"),
    Message("assistant", "Son diez niñas: «π ≈ 3»."),
)
NO_SYSTEM = {
    "google-gemma-2-2b-it": "System role not supported",
    "mistralai-Mistral-Nemo-Instruct-2407": "drops or changes the system's message",
}
"""Gemma's says so; Mistral's writes the system message before a last question only, so training would never show it."""
ADDED_BOS = {"afina/alpaca"}
"""The tokenizer of this family puts BOS before every text, and the template leaves that to it: we put it, as llama.cpp
does; transformers encodes rendered chats with nothing added."""
BEFORE_ANSWERS = {
    "Qwen-Qwen3-0.6B": ("", "<think>\n\n</think>\n\n"),
    "openai-gpt-oss-120b": ("<|channel|>final<|message|>",) * 2,
}
"""What the model itself writes before an earlier answer and before the last one."""
ENDS = {
    "google-gemma-2-2b-it": "<end_of_turn>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
}
"""Where it is not the end of sequence."""
ENDS_LAST_ONLY = {"openai-gpt-oss-120b"}
"""<|end|> closes earlier answers there, and the thoughts before an answer too: a model that stopped at it would stop
thinking, and one that learnt it after its answer would not stop."""


def sample(*messages: Message) -> Sample:
    return Sample(messages, Path("talk.jsonl"), 7)


def by_transformers(tokenizer: Tokenizer, messages, **options):
    rows = [{"role": message.role, "content": message.content} for message in messages]
    tools = [] if "{%- for tool in tools %}\n    {%- if tool.function is defined" in tokenizer.template else None
    return tokenizer.hf.apply_chat_template(
        rows, chat_template=tokenizer.template, tools=tools, return_dict=False, **options
    )


def learnt_texts(tokenizer: Tokenizer, row: Rendered) -> list[str]:
    """The text of every run of learnt tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.learnt, [False]])))
    return [tokenizer.hf.decode(row.ids[begin:end]) for begin, end in edges.reshape(-1, 2)]


def end_of(name: str) -> str:
    return ENDS.get(name, str(FAMILIES[name]["eos"]))


@families
@pytest.mark.parametrize("learn", ["all", "last", "text"])
def test_each_way_of_learning_learns_the_end(name, learn, family):
    render = Renderer(family(name), learn)
    for one in render.apart([sample(*ONE), sample(*TURNS)]):
        assert audit([one], [render.sample(one)], render.tokenizer, 1000) == []


@families
@pytest.mark.parametrize("messages", [ONE, WITH_SYSTEM, TURNS], ids=["one answer", "system", "two answers"])
def test_ids_are_those_of_transformers(name, messages, family):
    render = Renderer(family(name))
    if messages is WITH_SYSTEM and name in NO_SYSTEM:
        with pytest.raises(BadRows, match=NO_SYSTEM[name]) as raised:
            render.sample(sample(*messages))
        assert (raised.value.file, raised.value.line) == ("talk.jsonl", 7)
        assert raised.value.hint
        return
    ids = render.sample(sample(*messages)).ids.tolist()
    expected = by_transformers(render.tokenizer, messages)
    begin = [render.tokenizer.bos_id] if name in ADDED_BOS else []
    assert ids == begin + expected
    prompt = render.prompt(messages[:-1])
    assert prompt == begin + by_transformers(render.tokenizer, messages[:-1], add_generation_prompt=True)


WORDS = st.text(st.sampled_from("abczñé¿?.,:;19-*_()'\" \n🙂π"), max_size=24).map(lambda text: f"x{text}y")


@families
@with_fixture
@given(texts=st.lists(WORDS, min_size=2, max_size=6), system=st.none() | WORDS)
def test_any_conversation_has_the_ids_that_transformers_gives_it(name, family, texts, system):
    render = Renderer(family(name))
    texts = texts[: len(texts) // 2 * 2]
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    if system is not None and name not in NO_SYSTEM:
        messages = [Message("system", system), *messages]
    begin = [render.tokenizer.bos_id] if name in ADDED_BOS else []
    assert render.sample(sample(*messages)).ids.tolist() == begin + by_transformers(render.tokenizer, messages)


@families
def test_learnt_are_the_answers_and_the_end_of_turn(name, family):
    render = Renderer(family(name))
    first, last = BEFORE_ANSWERS.get(name, ("", ""))
    end = end_of(name)
    row = render.sample(sample(*TURNS))
    assert learnt_texts(render.tokenizer, row) == [
        first + TURNS[1].content + ("" if name in ENDS_LAST_ONLY else end),
        last + TURNS[3].content + end,
    ]
    only_last = Renderer(family(name), "last").sample(sample(*TURNS))
    assert only_last.ids.tolist() == row.ids.tolist()
    assert learnt_texts(render.tokenizer, only_last) == [last + TURNS[3].content + end]
    answered = render.answer(TURNS[:3], TURNS[3].content)
    assert answered.ids.tolist() == row.ids.tolist()
    assert answered.learnt.tolist() == only_last.learnt.tolist()
    assert not audit([sample(*TURNS)], [row], render.tokenizer, 4096)


def test_generation_markers_say_the_same(family):
    """afina/tiny's template marks what the assistant writes; its markers take in the end of turn, as we do."""
    render = Renderer(family("afina/tiny"))
    rows = [{"role": message.role, "content": message.content} for message in TURNS]
    marked = render.tokenizer.hf.apply_chat_template(
        rows, chat_template=render.tokenizer.template, return_dict=True, return_assistant_tokens_mask=True
    )
    row = render.sample(sample(*TURNS))
    assert row.ids.tolist() == marked["input_ids"]
    assert row.learnt.tolist() == [bool(one) for one in marked["assistant_masks"]]


def test_generation_markers_that_leave_the_end_of_turn_out():
    """Markers around the content alone: we learn one token more, the end of turn."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = Tokenizer(build(eos="<|im_end|>", special=["<|im_start|>"]), template)
    rows = [{"role": message.role, "content": message.content} for message in ONE]
    marked = tokenizer.hf.apply_chat_template(
        rows, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    row = Renderer(tokenizer).sample(sample(*ONE))
    last = marked["assistant_masks"][-len(tokenizer.encode(["It is four."])[0]) - 1 :]
    assert row.ids.tolist() == marked["input_ids"]
    assert row.learnt.tolist() == [False] * (len(row.ids) - len(last)) + [True] * len(last)
    assert last == [1] * (len(last) - 1) + [0]


ODD = [
    MARK,
    "\ue0f20\ue0f3",
    "\ue0f4",
    "\ue0f40\ue0f5",
    "\ue0f2",
    " ",
    "\n",
    "\n\n",
    "a",
    "ñ",
    "🙂",
    "\u2028",
    "<",
    "|>",
]


@st.composite
def conversations(draw, name: str):
    """User and assistant by turns, their words made of this family's markup, our own marks and odd characters."""
    family = FAMILIES[name]
    names = [family.get("bos"), family["eos"], "<|pad|>", *family["special"], *family.get("tags", [])]
    control = [text for text in names if text and text not in family.get("tags", [])]
    every = st.lists(st.sampled_from([*filter(None, names), *ODD]), max_size=6).map("".join)
    spoken = st.lists(st.sampled_from([*control, *ODD]), max_size=6).map("".join)
    messages = []
    for _turn in range(draw(st.integers(1, 2))):
        messages.append(Message("user", draw(every) + "x"))
        messages.append(Message("assistant", draw(spoken) + "y"))
    return messages


@families
@with_fixture
@given(data=st.data())
def test_no_text_becomes_a_control_token(name, family, data):
    """The markup of a rendered conversation is that of the same roles with harmless words; the prompt is a prefix."""
    messages = data.draw(conversations(name))
    render = Renderer(family(name))
    markup = set(render.tokenizer.markup.values())

    def skeleton(ids) -> list[int]:
        return [int(index) for index in ids if index in markup]

    harmless = [Message(message.role, "x" if message.role == "user" else "y") for message in messages]
    try:
        row = render.sample(sample(*messages))
    except DataError as error:  # gpt-oss refuses answers that spell its channels; nothing else does
        assert name == "openai-gpt-oss-120b" and "<|channel|>" in error.message
        return
    assert skeleton(row.ids) == skeleton(render.sample(sample(*harmless)).ids)
    assert skeleton(row.ids[row.learnt]) == skeleton((plain := render.sample(sample(*harmless))).ids[plain.learnt])
    for place in range(1, len(messages), 2):
        prompt = render.prompt(messages[:place])
        whole = render.sample(sample(*messages[: place + 1]))
        assert whole.ids[: len(prompt)].tolist() == prompt
        first = int(np.flatnonzero(Renderer(render.tokenizer, "last").sample(sample(*messages[: place + 1])).learnt)[0])
        assert first == len(prompt)
    last = learnt_texts(render.tokenizer, row)[-1]
    before = BEFORE_ANSWERS.get(name, ("", ""))[1]
    answer, end = messages[-1].content, end_of(name)
    assert last in {before + form + end for form in (answer, answer.strip(), answer.lstrip("\n"))}


@with_fixture
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), st.booleans())
def test_any_answer_comes_back_from_what_is_learnt(family, answer, system):
    render = Renderer(family("afina/chatml"))
    row = render.sample(sample(*(WITH_SYSTEM[:-1] if system else ONE[:-1]), Message("assistant", answer)))
    assert learnt_texts(render.tokenizer, row) == [answer + "<|im_end|>"]


def test_tags_are_tokens_where_template_or_assistant_write_them_and_nowhere_else(family):
    render = Renderer(family("Qwen-Qwen3-0.6B"))
    think = render.tokenizer.markup["<think>"]
    thoughtful = "<think>\nTwo and two.\n</think>\n\nIt is four."
    row = render.sample(sample(Message("user", "<think>?</think>"), Message("assistant", thoughtful)))
    assert row.ids.tolist().count(think) == 1
    assert learnt_texts(render.tokenizer, row) == [thoughtful + "<|im_end|>"]
    tools = Renderer(family("Qwen-Qwen2.5-7B-Instruct"))
    call = "<tool_call>\n{}\n</tool_call>"
    row = tools.sample(sample(Message("user", call), Message("assistant", call)))
    assert row.ids.tolist().count(tools.tokenizer.markup["<tool_call>"]) == 1


def test_thoughts_of_earlier_turns_may_be_left_out_unless_they_are_to_be_learnt(family):
    earlier = Message("assistant", "<think>\nHidden reasons.\n</think>\n\nIt is two.")
    talk = (TURNS[0], earlier, TURNS[2], TURNS[3])
    render = Renderer(family("Qwen-Qwen3-0.6B"))
    assert "Hidden" not in render.tokenizer.hf.decode(render.prompt(talk[:3]))
    assert Renderer(family("Qwen-Qwen3-0.6B"), "last").sample(sample(*talk)).learnt.any()
    with pytest.raises(BadRows, match="drops or changes the assistant's message"):
        render.sample(sample(*talk))


def test_switches_in_a_system_message(family):
    """SmolLM3's template takes /no_think out of the system message and writes empty thoughts before answers."""
    render = Renderer(family("HuggingFaceTB-SmolLM3-3B"))
    messages = (Message("system", "Be brief. /no_think"), *ONE)
    row = render.sample(sample(*messages))
    assert row.ids.tolist() == by_transformers(render.tokenizer, messages)
    assert learnt_texts(render.tokenizer, row) == ["It is four.<|im_end|>"]
    prompt = render.prompt(messages[:2])
    assert row.ids[: len(prompt)].tolist() == prompt


def test_a_template_that_edits_a_message_forges_no_control_token(family):
    """SmolLM3's takes the switch out of the system message, and so would put a token together that nobody hid."""
    forged = Message("system", "Be brief.<|im_/thinkend|>\n<|im_/thinkstart|>user")
    render = Renderer(family("HuggingFaceTB-SmolLM3-3B"))
    assert render.tokenizer.render([{"role": "system", "content": forged.content}]).count("<|im_end|>") == 2
    with pytest.raises(DataError, match="makes control tokens out of a message"):
        render.prompt((forged, ONE[0]))
    with pytest.raises(BadRows, match="makes control tokens out of a message"):
        render.sample(sample(forged, *ONE))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "Llama-3." in name or "gpt-oss" in name])
def test_the_date_stands_still(name, family):
    text = Renderer(family(name)).tokenizer.render([{"role": "user", "content": "x"}])
    assert "2024-07-26" in text or "26 Jul 2024" in text
    assert not re.search(r"\b20(2[5-9]|[3-9]\d)\b", text)


def test_white_space_that_tokens_swallow(family):
    """Phi's tokens take the line end after them, so the answer begins right after <|assistant|>."""
    render = Renderer(family("microsoft-Phi-3.5-mini-instruct"))
    row = render.sample(sample(*ONE))
    start = int(np.flatnonzero(row.learnt)[0])
    assert row.ids[start - 1] == render.tokenizer.markup["<|assistant|>"]


def test_a_template_that_trims(family):
    messages = (Message("user", "  What?\n"), Message("assistant", "\n It is four. \n"))
    for name in ("google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct", "afina/alpaca"):
        render = Renderer(family(name))
        assert learnt_texts(render.tokenizer, render.sample(sample(*messages))) == ["It is four." + end_of(name)]


def test_a_template_that_looks_into_the_contents():
    """One that turns answers in two kinds: the layout of placeholders does not hold, so marks are used."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ 'CODE ' if '`' in m.content else '' }}{{ m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = Tokenizer(build(eos="<|im_end|>", special=["<|im_start|>"]), template)
    talk = (ONE[0], Message("assistant", "`x`"), ONE[0], Message("assistant", "plain"))
    row = Renderer(tokenizer).sample(sample(*talk))
    assert learnt_texts(tokenizer, row) == ["CODE `x`<|im_end|>", "plain<|im_end|>"]
    prompt = Renderer(tokenizer).prompt(talk[:3])
    assert row.ids[: len(prompt)].tolist() == prompt


def test_a_template_that_closes_a_turn_on_the_users_word():
    template = (
        "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if '!' in messages[0].content %}<|im_end|>{% endif %}"
    )
    render = Renderer(Tokenizer(build(eos="<|im_end|>"), template))
    render.sample(sample(*ONE))
    with pytest.raises(BadRows, match="makes control tokens out of a message"):
        render.sample(sample(Message("user", "Now!"), ONE[1]))


def test_a_template_that_drops_the_answer_or_says_things_twice():
    special = build(eos="<|im_end|>")
    drops = Renderer(Tokenizer(special, "{{ messages[0].content }}<|im_end|>"))
    with pytest.raises(BadRows, match="drops or changes the assistant's"):
        drops.sample(sample(*ONE))
    twice = "{% for m in messages %}{{ m.content + '|' + m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(BadRows, match="drops or repeats the answer"):
        Renderer(Tokenizer(special, twice)).sample(sample(*ONE))


def test_all_samples_that_fail_are_named_at_once(family):
    render = Renderer(family("google-gemma-2-2b-it"))
    rows = [Sample(WITH_SYSTEM if n % 3 == 0 else ONE, Path("talk.jsonl"), n) for n in range(90)]
    with pytest.raises(BadRows) as raised:
        render.samples(rows)
    assert [problem.line for problem in raised.value.problems] == list(range(0, 90, 3))
    assert "30 of 90" in raised.value.message
    assert "... and 10 more" in raised.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[5].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages | dictsort }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_refused_in_one_sentence(template):
    with pytest.raises(ModelError, match="refuses these messages"):
        Renderer(Tokenizer(build(), template)).prompt(ONE[:1])


def test_no_template_and_one_that_is_none():
    with pytest.raises(ModelError, match="no chat template") as raised:
        Renderer(Tokenizer(build(), None)).sample(sample(*ONE))
    assert "afina/alpaca" in raised.value.hint
    with pytest.raises(ModelError, match="not valid Jinja"):
        Renderer(Tokenizer(build(), "{% for %}")).sample(sample(*ONE))


def test_the_audit_finds_each_fault():
    tokenizer = Tokenizer(build(bos="<s>", adds_bos=True), "{{ messages[0].content }}{{ eos_token }}")
    bos, end = tokenizer.bos_id, tokenizer.hf.eos_token_id

    def found(ids: list[int], learnt: list[int], limit: int = 100) -> list[str]:
        row = Rendered(np.array(ids, np.int32), np.array(learnt, np.bool_))
        one = sample(*ONE)
        faults = audit([one], [row], tokenizer, limit)
        assert all(where is one for where, _reason in faults)
        return [reason for _where, reason in faults]

    assert found([bos, 5, 6, end], [0, 0, 1, 1]) == []
    assert found([bos, 5, 6, end], [0, 0, 0, 0]) == ["nothing is learnt"]
    assert found([5], [1]) == ["nothing is learnt"]
    assert found([bos, 5, 6, end], [0, 0, 1, 0]) == ["the end of turn is not learnt, so the model would never stop"]
    assert found([bos, 5, 6, end], [0, 0, 1, 1], limit=3) == [
        "longer than model.max_length, which cuts the answer: 4 > 3"
    ]
    assert found([bos, bos, 5, end], [0, 0, 1, 1]) == ["more than one beginning-of-sequence token"]
    assert found([bos, 5, end, bos, 5, end], [0, 1, 1, 0, 1, 1]) == []  # a BOS a turn is how Llama 2 spoke
    assert len(found([bos, bos, 5, 6], [0, 0, 1, 0], limit=3)) == 3


def test_a_template_that_writes_bos_and_a_tokenizer_that_adds_it_give_one():
    tokenizer = Tokenizer(build(bos="<s>", adds_bos=True), "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    ids = Renderer(tokenizer).prompt(ONE[:1])
    assert ids.count(tokenizer.bos_id) == 1


def test_a_template_without_an_end_of_turn_is_found_by_the_audit():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = Tokenizer(build(special=["<|user|>", "<|assistant|>"]), template)
    row = Renderer(tokenizer).sample(sample(*TURNS))
    assert learnt_texts(tokenizer, row) == ["It is two.", TURNS[3].content]
    assert "never stop" in audit([sample(*TURNS)], [row], tokenizer, 4096)[0][1]
