"""A reasoning effort reaches the template, in memory and in llama.cpp, and is refused where it would not be heard."""

from pathlib import Path

import pytest
from small import loud_llama

from afina.data.conversation import Message
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError
from afina.model.generate import generate
from afina.recipe.schema import Chat
from afina.serve.session import Session
from afina.serve.speakers import GgufSpeaker, ModelSpeaker

TEMPLATE = (
    "{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif -%}"
    "<|im_start|>system\nReasoning: {{ reasoning_effort }}<|im_end|>"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [Message("user", "What is a loop?")]
EFFORTS = ("low", "medium", "high")


@pytest.fixture(scope="module")
def reasoning(tokenizer: Tokenizer) -> Renderer:
    return Renderer(Tokenizer(tokenizer.hf, TEMPLATE))


def test_the_effort_decides_the_prompt(reasoning: Renderer) -> None:
    model, answers = loud_llama(), {}
    for effort in (None, *EFFORTS):
        settings = Chat(temperature=0, max_new_tokens=8, effort=effort)
        answers[effort] = ModelSpeaker("x", model, reasoning).answer(ASKED, settings, 0, lambda piece: None)
        prompt = reasoning.tokenizer.hf.decode(reasoning.prompt(ASKED, {"reasoning_effort": effort or "medium"}))
        assert f"Reasoning: {effort or 'medium'}" in prompt
        ids = reasoning.tokenizer.hf(prompt, add_special_tokens=False)["input_ids"]
        alone = generate(model, [ids], end_ids=reasoning.tokenizer.end_ids, pad_id=0, max_new_tokens=8)[0]
        assert answers[effort] == reasoning.tokenizer.decode(alone)
    assert answers[None] == answers["medium"] and len(set(answers.values())) == 3


def test_a_template_that_does_not_know_it_is_told_of(renderer: Renderer) -> None:
    session = Session([ModelSpeaker("x", loud_llama(), renderer)], Chat(temperature=0, max_new_tokens=2))
    session.change(effort="low")
    with pytest.raises(DataError, match="no reasoning effort"):
        session.ask("hi")
    with pytest.raises(ValueError):
        session.change(effort="much")
    session.change(effort=None)
    session.ask("hi")


def test_llama_cpp_hears_it_too(reasoning: Renderer, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to talk to a GGUF file')
    from afina.export.gguf import write_gguf
    from afina.model.llamacpp import LlamaCpp

    loud_llama().save_pretrained(tmp_path)
    reasoning.tokenizer.save(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32")
    with LlamaCpp(tmp_path / "model.gguf", context=512, threads=1, cache="f32") as llama:
        speaker = GgufSpeaker("gguf", llama)
        for effort in EFFORTS:
            given = {"reasoning_effort": effort}
            assert speaker.prompt(ASKED, given) == reasoning.prompt(ASKED, given)
        assert speaker.prompt(ASKED) == reasoning.prompt(ASKED)
