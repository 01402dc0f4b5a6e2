"""What goes beyond contents and roles: thoughts, tool calls, weights, and answers that a template rewrites later."""

import json
from pathlib import Path

import numpy as np
import pytest
from data.byte_level import FAMILIES, build
from data.test_template import learnt_texts

from afina.data.audit.labels import audit, faults
from afina.data.conversation import Message, Sample, packed
from afina.data.messages import effort_from, message_from, tools_from
from afina.data.problem import BadRows
from afina.data.row import BadRow
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which."}},
            "required": ["city"],
        },
    },
}
CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Málaga"}}}]
WITH_TOOLS = (
    Message("user", "Is it warm?"),
    Message("assistant", "", more=packed({"tool_calls": CALL})),
    Message("tool", "31 degrees", more=packed({"tool_call_id": "abcdefghi", "name": "weather"})),
    Message("assistant", "Yes, 31 degrees."),
)
TOOL_FAMILIES = [
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "ibm-granite-granite-4.0",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
]
"""SmolLM3's template shows tools, but leaves calls of them out."""


def sample(*messages: Message, tools=(), effort: str = "") -> Sample:
    return Sample(messages, Path("talk.jsonl"), 7, packed(list(tools)), effort)


def rows_of(messages) -> list[dict]:
    rows = [{"role": one.role, "content": one.content, **one.details} for one in messages]
    return [{**row, "reasoning_content": row["thinking"]} if "thinking" in row else row for row in rows]


@pytest.mark.parametrize("name", TOOL_FAMILIES)
def test_tools(name, family):
    render = Renderer(family(name))
    one = sample(*WITH_TOOLS, tools=[TOOL])
    tokenizer = render.tokenizer
    made = render.apart([one])  # Qwen3 writes empty thoughts into a call that stands last, and into no other
    assert len(made) == (2 if name == "Qwen-Qwen3-0.6B" else 1)
    rows = render.samples(made)
    row = rows[-1]
    expected = tokenizer.hf.apply_chat_template(
        rows_of(WITH_TOOLS), chat_template=tokenizer.template, tools=[TOOL], return_dict=False
    )
    assert row.ids.tolist() == expected
    first, last = [text for one_row in rows for text in learnt_texts(tokenizer, one_row)]
    assert "weather" in first and "Málaga" in first and "Yes, 31 degrees." in last
    assert "31 degrees" not in first and "tool_response" not in first + last
    assert not audit(made, rows, tokenizer, 4096)
    for place in (1, 3):
        prompt = render.prompt(WITH_TOOLS[:place], one.given)
        assert prompt == tokenizer.hf.apply_chat_template(
            rows_of(WITH_TOOLS[:place]),
            chat_template=tokenizer.template,
            tools=[TOOL],
            return_dict=False,
            add_generation_prompt=True,
        )
    begin = int(np.flatnonzero(Renderer(tokenizer, "last").sample(one).learnt)[0])
    hermes = name.startswith("NousResearch")  # it writes a line end after a tool's answer only if more follows
    assert begin == len(render.prompt(WITH_TOOLS[:3], one.given)) + hermes


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TOOL_FAMILIES])
def test_a_template_without_room_for_tools_says_so(name, family):
    with pytest.raises(BadRows):
        Renderer(family(name)).sample(sample(*WITH_TOOLS, tools=[TOOL]))


def test_tools_and_calls_forge_nothing(family):
    """Markup in a tool's description, an argument, a result: all of it stays text."""
    for name in ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "meta-llama-Llama-3.1-8B-Instruct"):
        tokenizer = family(name)
        for text in [*tokenizer.control_tokens, "</tool_response>", "\ue0f20\ue0f3"]:
            tool = {"type": "function", "function": {**TOOL["function"], "description": text}}
            said = "Cádiz" if text.startswith("</") else text  # a tag is the assistant's to write
            call = [{**CALL[0], "function": {"name": "weather", "arguments": {"city": said}}}]
            messages = (
                Message("user", text + "?"),
                Message("assistant", "", more=packed({"tool_calls": call})),
                Message("tool", text, more=WITH_TOOLS[2].more),
                WITH_TOOLS[3],
            )
            markup = set(tokenizer.markup.values())
            found = [
                [
                    int(index)
                    for row in Renderer(tokenizer).samples(Renderer(tokenizer).apart([sample(*said, tools=[offered])]))
                    for index in row.ids
                    if index in markup
                ]
                for said, offered in ((messages, tool), (WITH_TOOLS, TOOL))
            ]
            assert found[0] == found[1], (name, text)


def test_thoughts_are_learnt_before_the_last_answer(family):
    think = packed({"thinking": "Two and two."})
    messages = (Message("user", "2+2?"), Message("assistant", "Four.", more=think))
    qwen = Renderer(family("Qwen-Qwen3-0.6B"))
    assert learnt_texts(qwen.tokenizer, qwen.sample(sample(*messages))) == [
        "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"
    ]
    harmony = Renderer(family("openai-gpt-oss-120b"))
    assert learnt_texts(harmony.tokenizer, harmony.sample(sample(*messages))) == [
        "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    ]
    with pytest.raises(BadRows, match="drops or changes the assistant's"):
        Renderer(family("meta-llama-Llama-3.1-8B-Instruct")).sample(sample(*messages))


def test_effort_per_sample(family):
    render = Renderer(family("openai-gpt-oss-120b"))
    for effort in ("low", "medium", "high"):
        one = sample(Message("user", "2+2?"), Message("assistant", "Four."), effort=effort)
        assert f"Reasoning: {effort}\n" in render.tokenizer.hf.decode(render.sample(one).ids)
        assert f"Reasoning: {effort}\n" in render.tokenizer.hf.decode(render.prompt(one.prompt, one.given))


TALK = tuple(
    Message(role, f"{role} {turn}", more=packed({"thinking": f"thought {turn}"}) if role == "assistant" else "")
    for turn in range(3)
    for role in ("user", "assistant")
)
PLAIN = tuple(Message(one.role, one.content) for one in TALK)
REWRITES = {"Qwen-Qwen3-0.6B", "openai-gpt-oss-120b"}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_are_rewritten_become_samples_of_their_own(name, family):
    render = Renderer(family(name))
    one = sample(*PLAIN)
    made = render.apart([one])
    assert len(made) == (3 if name in REWRITES else 1)
    assert Renderer(render.tokenizer, "last").apart([one]) == [one]
    for place, part in zip((1, 3, 5), made, strict=False):
        if len(made) > 1:
            row = render.sample(part)
            (said,) = learnt_texts(render.tokenizer, row)
            assert f"assistant {place // 2}" in said
            begin = int(np.flatnonzero(row.learnt)[0])
            assert row.ids[:begin].tolist() == render.prompt(PLAIN[:place])
            assert row.ids[begin:].tolist() == render.answer(PLAIN[:place], PLAIN[place].content).ids[begin:].tolist()
            assert int(row.ids[-1]) in render.tokenizer.end_ids or row.ids.size > begin
    assert not audit(made, render.samples(made), render.tokenizer, 4096)


def test_thoughts_of_every_turn_are_learnt_when_apart(family):
    for name in sorted(REWRITES):
        render = Renderer(family(name))
        with pytest.raises(BadRows):
            render.sample(sample(*TALK))
        rows = render.samples(render.apart([sample(*TALK)]))
        assert [
            f"thought {turn}" in " ".join(learnt_texts(render.tokenizer, row)) for turn, row in enumerate(rows)
        ] == [True] * 3


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_weights():
    tokenizer = Tokenizer(build(eos="<|im_end|>", special=["<|im_start|>"]), CHATML)
    messages = (PLAIN[0], Message("assistant", "one", 0.0), PLAIN[2], Message("assistant", "two", 0.25), *PLAIN[4:])
    row = Renderer(tokenizer).sample(sample(*messages))
    assert learnt_texts(tokenizer, row) == ["two<|im_end|>", "assistant 2<|im_end|>"]
    assert set(row.weights[row.learnt].tolist()) == {0.25, 1.0}
    assert not row.weights[~row.learnt].any()
    plain = Renderer(tokenizer).sample(sample(*PLAIN))
    assert plain.weights is None
    muted = Renderer(tokenizer).sample(sample(*messages[:2], *messages[2:3], Message("assistant", "two"), *PLAIN[4:]))
    assert muted.weights is None and muted.learnt.sum() < plain.learnt.sum()


def test_the_whole_text_is_learnt_when_asked():
    tokenizer = Tokenizer(build(eos="<|im_end|>", special=["<|im_start|>"]), CHATML)
    row = Renderer(tokenizer, "text").sample(sample(*PLAIN))
    assert row.learnt[:-1].all() and row.weights is None
    assert tokenizer.hf.decode(row.ids[-2:]) == "<|im_end|>\n" and not row.learnt[-1]  # nobody writes after the end
    assert list(faults(row, tokenizer, 1000)) == []
    assert row.ids.tolist() == Renderer(tokenizer).sample(sample(*PLAIN)).ids.tolist()
    closed = Tokenizer(
        build(eos="<|fin|>", special=["<|im_start|>", "<|im_end|>"]), CHATML.replace("<|im_end|>", "<|fin|><|im_end|>")
    )
    row = Renderer(closed, "text").sample(sample(*PLAIN))
    assert closed.hf.decode(row.ids[row.learnt][-1:]) == "<|fin|>" and list(faults(row, closed, 1000)) == []
    part = sample(PLAIN[0], Message("assistant", "no", 0.0), *PLAIN[2:])
    row = Renderer(tokenizer, "text").sample(part)
    assert "no<|im_end|>" not in "".join(learnt_texts(tokenizer, row))
    assert learnt_texts(tokenizer, row)[0].endswith("assistant\n")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "no text content"),
        ({"role": "narrator", "content": "x"}, "narrator"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "user", "content": "x", "tool_calls": CALL}, "only the assistant"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "without a function's name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "not a JSON object"),
        ({"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}, "two different thoughts"),
        ({"role": "assistant", "content": "x", "thinking": 3}, "not a text"),
        ({"role": "assistant", "content": "x", "weight": -1}, "weight"),
        ({"role": "assistant", "content": "x", "weight": True}, "weight"),
        ({"role": "assistant", "content": "x", "weight": float("inf")}, "weight"),
        ({"role": "user", "content": "x", "weight": 1}, "only the assistant's messages"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "no text content"),
    ],
)
def test_messages_that_cannot_be_used(value, reason):
    with pytest.raises(BadRow, match=reason):
        message_from(value, 1)


def test_messages_as_openai_writes_them():
    said = message_from(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            "weight": 0,
        },
        1,
    )
    assert said.details == {
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    }
    assert said.weight == 0
    assert message_from({"role": "user", "content": [{"type": "text", "text": "a"}]}, 1) == Message("user", "a")
    assert json.loads(tools_from({"tools": json.dumps([{"name": "f"}])})) == [
        {"type": "function", "function": {"description": "", "name": "f"}}
    ]
    assert tools_from({}) == "" and effort_from({"reasoning_effort": "low"}) == "low"
    for row in ({"tools": "{"}, {"tools": {"name": "f"}}, {"tools": [{}]}, {"tools": [{"name": "f", "parameters": 1}]}):
        with pytest.raises(BadRow):
            tools_from(row)
    with pytest.raises(BadRow, match="reasoning_effort"):
        effort_from({"effort": "huge"})


def test_digests_tell_all_of_it_apart():
    one = sample(*PLAIN)
    others = [
        sample(PLAIN[0], Message("assistant", PLAIN[1].content, 0.5)),
        sample(*WITH_TOOLS),
        sample(*WITH_TOOLS, tools=[TOOL]),
        sample(*PLAIN, effort="low"),
        sample(*TALK),
    ]
    assert len({each.digest() for each in (one, *others)}) == 6
