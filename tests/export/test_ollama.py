"""The Modelfile's template, rendered by Go as Ollama does it, gives the token ids of training."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from afina.data.conversation import Message
from afina.data.load_tokenizer import load_tokenizer
from afina.data.splits import LLAMA3_SPLIT
from afina.data.template import Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import ModelError
from afina.export.ollama import modelfile, read_turns, stops
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Chat

HERE = Path(__file__).parent
OWN = sorted((BUNDLED / "templates").glob("*.jinja"))
WRITTEN = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ (ns.s if loop.index0 <= 1 else '') + m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '}}' }}{{ m.content }}\n{% endfor %}",
}
CORPUS: list[list[tuple[str, str]]] = [
    [("user", "Hello!")],
    [("user", "¿Qué tal?"), ("assistant", "Bien."), ("user", "2 + 2 = ?")],
    [("system", "Be brief."), ("user", "Write {{ .Content }} in Go, \"quoted\" and 'quoted'.")],
    [
        ("system", "One.\n\nTwo."),
        ("user", "a\n\nb"),
        ("assistant", "c\td"),
        ("user", "日本語 🙂"),
        ("assistant", "e"),
        ("user", "f"),
    ],
    [("user", "x" * 400), ("assistant", "<b>&amp;</b>"), ("user", "#!/bin/sh\nexit 0")],
]


def tokenizer(template: str) -> Tokenizer:
    loaded = load_tokenizer(str(BUNDLED / "tiny"))
    markup = [*re.findall(r"<\|?[a-z_]+\|?>|\[/?INST\]", template), "<|system|>", "<|user|>", "<|assistant|>"]
    loaded.hf.add_special_tokens({"additional_special_tokens": [*dict.fromkeys(markup)]})
    # As Llama 3 cuts texts: line ends stay together. GPT-2's way cuts "\n\n" in two where a word follows, so that text
    # that was rendered whole has other ids than text to which an answer was added, in any program that renders texts.
    loaded.hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Tokenizer(loaded.hf, template)


def templates() -> dict[str, Tokenizer]:
    found = {path.stem: tokenizer(path.read_text("utf-8")) for path in OWN}
    return found | {name: tokenizer(text) for name, text in WRITTEN.items()}


def template_of(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1)


def by_go(asked: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (Debian: golang-go): the template cannot be rendered as Ollama does")
    environment = {"PATH": "/usr/bin:/bin:/usr/local/go/bin", "HOME": str(folder), "GOCACHE": str(folder / "cache")}
    environment |= {"GO111MODULE": "off", "GOFLAGS": ""}
    done = subprocess.run(
        ["go", "run", str(HERE / "render.go")],
        input=json.dumps(asked).encode(),
        capture_output=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()
    rendered: list[list[str]] = json.loads(done.stdout)
    return rendered


def conversations(turns: Any) -> list[list[tuple[str, str]]]:
    return [rows for rows in CORPUS if turns.system_in != "nowhere" or rows[0][0] != "system"]


@pytest.mark.slow  # Go compiles its standard library first
def test_go_renders_the_ids_of_training(tmp_path: Path) -> None:
    known = templates()
    asked = []
    for one in known.values():
        text, _notes = modelfile(one, "a.gguf", Chat(), system=None, context=512)
        cases = [
            {
                "System": rows[0][1] if rows[0][0] == "system" else "",
                "Messages": [{"Role": role, "Content": content} for role, content in rows],
            }
            for rows in conversations(read_turns(one)[0])
        ]
        asked.append({"Template": template_of(text), "Cases": cases})
    for (name, one), texts in zip(known.items(), by_go(asked, tmp_path), strict=True):
        for rows, text in zip(conversations(read_turns(one)[0]), texts, strict=True):
            ours = Renderer(one).prompt([Message(role, content) for role, content in rows])
            assert list(one.hf(text)["input_ids"]) == ours, (name, rows, text)


@pytest.mark.parametrize("name", templates())
def test_what_is_read_renders_like_the_template(name: str) -> None:
    one = templates()[name]
    turns, notes = read_turns(one)
    for rows in conversations(turns):
        messages = [{"role": role, "content": content} for role, content in rows]
        assert turns.render(messages) == one.render(messages, prompt=True)
    assert bool(notes) == ("strip()" in (one.template or "") or "trim" in (one.template or ""))


@pytest.mark.real
def test_templates_of_the_world(real_data: Path) -> None:
    folder = real_data / "templates"
    if not folder.is_dir():
        pytest.skip("no templates among the real inputs")
    for path in sorted(folder.glob("*.jinja")):
        one = load_tokenizer(str(BUNDLED / "tiny"), template=str(path))
        turns, _notes = read_turns(one)
        for rows in conversations(turns):
            messages = [{"role": role, "content": content} for role, content in rows]
            assert turns.render(messages) == one.render(messages, prompt=True), path.name


def test_the_modelfile() -> None:
    one = templates()["chatml"]
    text, notes = modelfile(one, "a-q4_k_m.gguf", Chat(temperature=0.3), system='Say "hi".', context=512)
    lines = text.splitlines()
    assert lines[0] == "FROM ./a-q4_k_m.gguf" and notes == []
    assert 'SYSTEM """Say "hi"."""' in lines and 'PARAMETER stop "<|im_end|>"' in lines
    assert lines[-4:] == [
        "PARAMETER temperature 0.3",
        "PARAMETER top_p 0.95",
        "PARAMETER num_ctx 512",
        "PARAMETER num_predict 512",
    ]
    assert stops(read_turns(templates()["alpaca"])[0], one) == ["<|im_end|>", "### Instruction:"]
    text, notes = modelfile(templates()["gemma"], "a.gguf", Chat(), system="Be brief.", context=512)
    assert "SYSTEM" not in text and any("system" in note for note in notes)
    with pytest.raises(ModelError, match="quotation"):
        modelfile(one, "a.gguf", Chat(), system='"""', context=512)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
        "{{ messages | length }} {% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ messages[-1].content }}",
    ],
)
def test_templates_that_do_more_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match="Ollama"):
        read_turns(tokenizer(template))


@pytest.mark.slow
def test_ollama_takes_it(tmp_path: Path) -> None:
    if shutil.which("ollama") is None:
        pytest.skip("ollama is not installed")
    from afina.export.gguf import write_gguf

    write_gguf(BUNDLED / "tiny", tmp_path / "a.gguf", "q8_0")
    text, _notes = modelfile(load_tokenizer(str(BUNDLED / "tiny")), "a.gguf", Chat(), system=None, context=512)
    (tmp_path / "Modelfile").write_text(text, "utf-8")
    subprocess.run(["ollama", "create", "afina-test", "-f", "Modelfile"], cwd=tmp_path, check=True, timeout=120)
