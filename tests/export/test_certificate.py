"""Each way in which exports go wrong is injected, and something catches it before a file is left behind."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.faults import BEGIN, BY_NAME, DOCS, END, FAULTS, Fault, change_vocabulary, table, tied_head
from journey.tiny import lay_out, save_base
from transformers import AutoModelForCausalLM

import afina
from afina.artifact import open_artifact
from afina.console import Console
from afina.data.conversation import Message, Sample
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import ModelError, ProofError, ResourceError
from afina.export import certificate
from afina.export import run as room
from afina.export.certificate import LIMITS, certify, pose
from afina.export.divergence import distributions, divergence
from afina.export.gguf import write_gguf
from afina.export.lora import write_lora
from afina.export.mixes import FORMATS
from afina.export.run import export_run
from afina.model import imatrix
from afina.model.llamacpp import LlamaCpp
from afina.recipe.place import BUNDLED
from afina.train.reopen import reopen

xllamacpp = pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to run GGUF files')

Patch = pytest.MonkeyPatch
QUESTIONS = ["The soup is great.", "The café is awful, really awful.", "¿Qué tal?", "Hello!"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    return Path(afina.train(folder / "recipe.yaml", folder / "run", ["training.steps=12"]))


@pytest.fixture(autouse=True)
def few(monkeypatch: Patch) -> None:
    monkeypatch.setattr(room, "QUESTIONS", 4)


def quiet() -> Console:
    console = Console()
    console.json = True
    return console


def samples() -> list[Sample]:
    return [
        Sample((Message("user", text), Message("assistant", "good")), Path("a"), at)
        for at, text in enumerate(QUESTIONS)
    ]


# ---------------------------------------------------------------- the faults


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.inject], ids=lambda fault: fault.inject.__name__)
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_fault_is_caught_and_no_file_kept(
    run: Path, tmp_path: Path, monkeypatch: Patch, fault: Fault, kind: str
) -> None:
    fault.inject(monkeypatch, run)
    with pytest.raises(ProofError, match=fault.says):
        export_run(run, tmp_path / "export", [kind], quiet())
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"export-failed", "certificate.json", "certificate.html"}
    said = json.loads((tmp_path / "export-failed" / "certificate.json").read_text("utf-8"))
    assert re.search(fault.says, said["failed"]) and not any(file["passed"] for file in said["files"])
    assert len(said["files"]) == (fault.caught_by != "the merge")


def test_the_table_of_faults_in_the_docs_is_that_of_the_tests() -> None:
    text = DOCS.read_text("utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table(), "run: python -m export.faults"


def test_a_head_left_out_is_caught(tmp_path: Path) -> None:
    """The head learnt on its own, but the file says it is the embeddings: llama.cpp then takes these."""
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    renderer = Renderer(load_tokenizer(str(base)))
    questions = pose(model, renderer, samples(), 8)
    write_gguf(base, tmp_path / "right.gguf", "f32")
    certify(tmp_path / "right.gguf", "f32", questions, renderer)
    tied_head(base)
    write_gguf(base, tmp_path / "wrong.gguf", "f32")
    with pytest.raises(ProofError, match=BY_NAME["a head of its own left out, embeddings in its place"].says):
        certify(tmp_path / "wrong.gguf", "f32", questions, renderer)


def test_an_end_that_llamacpp_does_not_know_is_caught(tmp_path: Path, monkeypatch: Patch) -> None:
    """An end of turn with a name of its own, which the file forgets to mention."""
    base = save_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (base / name).read_text("utf-8")
        (base / name).write_text(text.replace("<|im_end|>", "<|fin|>"), "utf-8")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    renderer = Renderer(load_tokenizer(str(base)))
    questions = pose(model, renderer, samples(), 8)
    write_gguf(base, tmp_path / "right.gguf", "f32")
    certify(tmp_path / "right.gguf", "f32", questions, renderer)
    change_vocabulary(monkeypatch, lambda v: dataclasses.replace(v, eos=0, eot=None, eom=None))
    write_gguf(base, tmp_path / "wrong.gguf", "f32")
    with pytest.raises(ProofError, match=BY_NAME["the end of turn not named in the file"].says):
        certify(tmp_path / "wrong.gguf", "f32", questions, renderer)


# ---------------------------------------------------------------- a context too small for some prompts


def test_prompts_beyond_the_context_are_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_position_embeddings=64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    renderer = Renderer(load_tokenizer(str(base)))
    long = dataclasses.replace(samples()[0], messages=(Message("user", "soup " * 20), Message("assistant", "good")))
    write_gguf(base, tmp_path / "one.gguf", "f32")
    told: list[float] = []
    found = certify(tmp_path / "one.gguf", "f32", pose(model, renderer, [long, *samples()]), renderer, told.append)
    assert len(found["checks"]) == 4 and sum(told) == 5
    with pytest.raises(ResourceError, match="no prompt leaves room for 32 tokens of an answer in its context of 64"):
        certify(tmp_path / "one.gguf", "f32", pose(model, renderer, [long]), renderer)


# ---------------------------------------------------------------- what it says when all is well


def test_the_certificate(run: Path, tmp_path: Path) -> None:
    formats = ["q8_0", "q4_k_m", "lora", "ollama", "lmstudio"]
    export = export_run(
        run, tmp_path / "export", [f"gguf:{name}" if name[0] == "q" else name for name in formats], quiet()
    )
    export.verify()
    said = json.loads((tmp_path / "export" / "certificate.json").read_text("utf-8"))
    assert said["questions"] == 4 and said["merge"]["adapter_tensors"] == 28 and len(said["merge"]["modules"]) == 14
    assert all(module["change"] > 0 for module in said["merge"]["modules"])
    assert said["merge"]["divergence"] < 1e-6
    eight, four = said["files"]
    assert eight["passed"] and four["passed"] and eight["certificate"]["divergence"] < four["certificate"]["divergence"]
    assert set(eight["certificate"]["right_answers"]) == {"model", "gguf"} and said["merge"]["streamed"]
    shown = (tmp_path / "export" / "certificate.html").read_text("utf-8")
    assert "opinions-q4_k_m.gguf" in shown and "<script" not in shown and shown.count('class="mean"') == 2
    assert four["fallbacks"]["blk.0.attn_q.weight"] == "meant as q4_k, stored as q5_0"  # rows of 64
    assert [entry["format"] for entry in export.manifest["exports"]] == formats
    place = tmp_path / "export"
    assert (place / "Modelfile").read_text().startswith("FROM ./opinions-q8_0.gguf\n")
    file = place / "lmstudio" / "afina" / "opinions" / "opinions-q8_0.gguf"
    assert file.samefile(place / "opinions-q8_0.gguf")


def test_divergence_joins_what_was_not_told() -> None:
    ours = np.log(np.array([0.5, 0.2, 0.2, 0.1]))
    theirs = np.log(np.array([0.4, 0.3, 0.1, 0.2]))
    whole = divergence(ours, dict(enumerate(theirs)))
    assert whole == pytest.approx(float((np.exp(ours) * (ours - theirs)).sum()))
    joined = divergence(ours, {0: theirs[0], 1: theirs[1]})
    assert joined == pytest.approx(0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.3) + 0.3 * np.log(0.3 / 0.3))
    assert 0 <= joined <= whole
    assert divergence(ours, dict(enumerate(ours))) == 0


def test_every_format_has_limits() -> None:
    assert set(LIMITS) == {*FORMATS, "nf4"}


# ---------------------------------------------------------------- formats, measured in llama.cpp

ORDER = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


def measured(folder: Path, questions: Any, renderer: Renderer, out: Path, kind: str, **steer: Any) -> float:
    write_gguf(folder, out / f"{kind}{len(steer)}.gguf", kind, **steer)
    return float(certify(out / f"{kind}{len(steer)}.gguf", kind, questions, renderer)["divergence"])


def posed(folder: Path, texts: list[str]) -> tuple[Any, Any, Renderer]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    renderer = Renderer(load_tokenizer(str(folder)))
    rows = [Sample((Message("user", text), Message("assistant", "x")), Path("a"), 1) for text in texts]
    return model, pose(model, renderer, rows), renderer


TEXTS = [
    "Hello!",
    "What is 12 + 30?",
    "Write a Python function that adds two numbers.",
    "¿Cuánto es 7 x 8?",
    "Tell me about dogs.",
    "What is the capital of France?",
    "Sort the list [3,1,2].",
    "Translate good morning to Spanish.",
]


@pytest.mark.skipif(not (BUNDLED / "tiny" / "model.safetensors").is_file(), reason="afina/tiny holds no weights")
def test_fewer_bits_are_further_from_the_model(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(certificate, "LIMITS", dict.fromkeys(LIMITS, certificate.Limits(999.0, 0.0)))
    model, questions, renderer = posed(BUNDLED / "tiny", TEXTS)
    found = {kind: measured(BUNDLED / "tiny", questions, renderer, tmp_path, kind) for kind in (*ORDER, "iq4_xs")}
    values = [found[kind] for kind in ORDER]
    assert values == sorted(values), found
    assert found["f16"] < 1e-4 and found["q8_0"] < 5e-3 and found["q4_k_m"] < 0.2 and found["iq4_xs"] < 0.3, found
    importance = imatrix.collect(model, [question.ids for question in questions])
    assert len(importance) == 36 and importance["model.layers.0.mlp.down_proj.weight"].shape == (512,)
    steered = measured(BUNDLED / "tiny", questions, renderer, tmp_path, "q2_k", importance=importance)
    assert steered < found["q2_k"], (steered, found)


@pytest.mark.real
def test_stories_in_few_bits(real_data: Path, tmp_path: Path) -> None:
    """Rows of 64 and 172: every matrix falls back, and the file still is the model."""
    source = real_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompt = [1, 403, 407, 261, 378]
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60)[0].tolist()
    (logprobs,) = distributions(model, [(prompt, ids[len(prompt) :])])
    found = {}
    for kind in ORDER:
        facts = write_gguf(source, tmp_path / f"{kind}.gguf", kind)
        assert bool(facts["fallbacks"]) == (kind != "f16") and len(facts["not_quantised"]) == (
            0 if kind == "f16" else 5
        )
        with LlamaCpp(tmp_path / f"{kind}.gguf", cache="f32") as witness:
            told = witness.logprobs(ids, top=512, start=len(prompt))
        found[kind] = float(np.mean([divergence(*pair) for pair in zip(logprobs, told, strict=True)]))
    assert found["f16"] < 1e-5 and found["q8_0"] < 2e-3 and found["q4_k_m"] < 0.03 and found["q2_k"] < 0.15, found


# ---------------------------------------------------------------- the adapter alone


def test_llamacpp_adds_the_adapter_to_the_base(run: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_gguf(run.parent / "base", base, "f32")
    facts = write_lora(run / "adapter", run.parent / "base", adapter, name="opinions")
    assert facts["tensors"] == 28
    plain = xllamacpp.CommonParams

    def with_adapter() -> Any:
        parameters = plain()
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        return parameters

    ids = list(range(3, 43))
    tuned = reopen(run, "fp32")
    (ours,) = distributions(tuned.model, [(ids[:1], ids[1:])])
    with LlamaCpp(base, threads=1, cache="f32") as alone:
        without = alone.logprobs(ids, top=ours.shape[1])
    monkeypatch.setattr(xllamacpp, "CommonParams", with_adapter)
    with LlamaCpp(base, threads=1, cache="f32") as both:
        found = both.logprobs(ids, top=ours.shape[1])
    far, near = (
        max(abs(row[index] - value) for row, told in zip(ours, every, strict=True) for index, value in told.items())
        for every in (without, found)
    )
    assert near < 2e-3 < 0.05 < far


def test_adapters_that_llamacpp_cannot_add(run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((run / "adapter" / name).read_bytes())
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(ModelError, match="DoRA"):
        write_lora(tmp_path, run.parent / "base", tmp_path / "a.gguf", name="a")
    assert open_artifact(run).kind == "run"


def test_rows_read_together_as_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"), dtype=torch.float32).eval()
    asked = [([3, 99, 200], [17, 5]), ([9], []), ([4, 4, 81, 7, 65, 12, 300], [2]), ([250, 6], [1, 1, 1])]
    alone = [distributions(model, [one])[0] for one in asked]
    for room_for in (2**27, 400 * 8 * 2):  # all at once; two at a time
        monkeypatch.setitem(distributions.__globals__, "LOGITS", room_for)
        for (_prompt, answer), found, one in zip(asked, distributions(model, asked), alone, strict=True):
            assert found.shape[0] == len(answer) + 1
            np.testing.assert_allclose(found, one, atol=1e-5)
