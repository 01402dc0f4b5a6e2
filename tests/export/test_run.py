"""A run to files that others run: what is kept, what is refused, and that a wrong file is noticed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export.test_gguf import byte_level, pack_experts, random_model
from families import build
from journey.tiny import lay_out, save_base, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import afina
from afina import durable
from afina.artifact import open_artifact
from afina.console import Console
from afina.errors import ProofError, RecipeError, ResourceError
from afina.export import certificate, nf4
from afina.export import merge as merge_room
from afina.export import run as room
from afina.export.gguf import write_gguf
from afina.export.run import export_run
from afina.gguf_file import GgufFile
from afina.train.reopen import reopen

pytest.importorskip("xllamacpp", reason='install "afina[gguf-run]" to run GGUF files')

UNTOLD = """{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{{ '' if MARK is defined else 'x' }}{%- endif -%}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder)
    return afina.train(folder / "recipe.yaml", folder / "run")


def quiet() -> Console:
    console = Console()
    console.json = True
    return console


def test_each_format_once_with_its_proof(run, tmp_path):
    export = export_run(run, tmp_path / "export", ["q8_0", "f32", "f16", "merged", "f32"], quiet())
    export.verify()
    entries = {entry["format"]: entry for entry in export.manifest["exports"]}
    assert list(entries) == ["q8_0", "f32", "f16", "merged"]
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"manifest.json", "merged", *(f"opinions-{kind}.gguf" for kind in ("q8_0", "f32", "f16"))} <= files
    for kind in ("f32", "f16", "q8_0"):
        assert len(entries[kind]["checks"]) >= 8
    assert all(check["equal"] for kind in ("f32", "f16") for check in entries[kind]["checks"])
    assert export.manifest["parents"][0]["sha256"] == open_artifact(run).digest


def test_the_merged_folder_answers_as_the_run(run, tmp_path):
    export_run(run, tmp_path / "export", ["merged"], quiet())
    ids = torch.tensor([[3, 99, 200, 17]])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "merged").eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            whole(input_ids=ids).logits, reopen(run).model(input_ids=ids).logits, rtol=1e-5, atol=1e-4
        )


def test_the_merged_model_is_not_kept_where_nobody_asked(run, tmp_path):
    export_run(run, tmp_path / "export", ["f32"], quiet())
    assert not (tmp_path / "export" / "merged").exists()


def test_a_file_of_other_weights_is_refused_and_nothing_kept(run, tmp_path, monkeypatch):
    """The proof can fail: the base is written where the tuned model should be."""

    def wrong(folder, out, kind, **named):
        model = AutoModelForCausalLM.from_pretrained(run.parent / "base")
        model.save_pretrained(tmp_path / "other")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(folder / name, tmp_path / "other")
        return write_gguf(tmp_path / "other", out, kind, **named)

    monkeypatch.setattr(room, "write_gguf", wrong)
    for kind in ("f32", "q8_0"):
        with pytest.raises(ProofError):
            export_run(run, tmp_path / "export", [kind], quiet())
        assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".*"))
        assert (tmp_path / "export-failed" / "certificate.html").is_file()


def test_a_file_that_sees_another_prompt_is_refused(run, tmp_path, monkeypatch):
    def wrong(folder, out, kind, **named):
        (folder / "chat_template.jinja").write_text(UNTOLD, "utf-8")
        return write_gguf(folder, out, kind, **named)

    monkeypatch.setattr(room, "write_gguf", wrong)
    with pytest.raises(ProofError):
        export_run(run, tmp_path / "export", ["f32"], quiet())
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("formats, complaint", [(["q3_k"], "no format q3_k"), ([], "names no formats")])
def test_formats_there_are_not(run, tmp_path, formats, complaint):
    with pytest.raises(RecipeError, match=complaint) as caught:
        export_run(run, tmp_path / "export", formats, quiet())
    assert caught.value.hint and not (tmp_path / "export").exists()


def test_an_interrupted_export_is_taken_up(run, tmp_path, monkeypatch):
    written = []

    def counted(folder, out, kind, **named):
        written.append(kind)
        if kind == "f16" and written.count("f16") == 1:
            raise KeyboardInterrupt
        return write_gguf(folder, out, kind, **named)

    monkeypatch.setattr(room, "write_gguf", counted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "export", ["q8_0", "f16"], quiet())
    assert not (tmp_path / "export").exists()
    monkeypatch.setattr(merge_room, "fold", None)  # is not needed again
    export = export_run(run, tmp_path / "export", ["q8_0", "f16"], quiet())
    assert written == ["q8_0", "f16", "f16"]
    export.verify()
    assert [len(entry["checks"]) > 0 for entry in export.manifest["exports"]] == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_file_that_changed_meanwhile_is_written_again(run, tmp_path, monkeypatch):
    def stop(*_given, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "_add_other", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "export", ["q8_0", "lmstudio"], quiet())
    monkeypatch.undo()
    (file,) = tmp_path.rglob("*.gguf")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    export_run(run, tmp_path / "export", ["q8_0", "lmstudio"], quiet())
    assert (tmp_path / "export" / file.name).read_bytes() == content


def test_no_room_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    needed = []

    def enough(_path):
        return needed[0] if needed else 10**12

    monkeypatch.setattr(durable, "free_bytes", enough)
    export = export_run(run, tmp_path / "export", ["q8_0", "merged"], quiet())
    needed.append(sum(path.stat().st_size for path in export.folder.glob("**/*.*f*")) // 2)
    with pytest.raises(ResourceError, match=r"needs .* on the disk"):
        export_run(run, tmp_path / "again", ["q8_0", "merged"], quiet())
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".*"))


def test_a_merge_in_sixteen_bits(run, tmp_path):
    record = json.loads((run / "manifest.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record["recipe"]["export"]["precision"] = "bf16"
    (copy / "manifest.json").write_text(json.dumps(record))
    export_run(copy, tmp_path / "export", ["merged", "q8_0"], quiet())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "merged")
    assert whole.dtype == torch.bfloat16
    said = json.loads((tmp_path / "export" / "certificate.json").read_text())
    assert 0 < said["merge"]["divergence"] < 0.01 and said["merge"]["precision"] == "bf16"


@pytest.mark.slow
def test_gpt_oss_from_training_to_files_with_its_experts_packed(tmp_path):
    """The adapter is on attention and router; the experts are in the files as they were in the base."""
    base = tmp_path / "base"
    model = random_model("gpt-oss")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # or rounding sends tokens to other experts
    model.save_pretrained(base)
    byte_level(base)
    blocks = pack_experts(base, model)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    rows = [{"role": "user", "content": "say {n}"}, {"role": "assistant", "content": "I say {n}"}]
    lines = [json.dumps({"messages": rows}).replace("{n}", str(number)) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        "name: oss\nmodel: {base: ./base, max_length: 128, precision: fp32}\ndata: {train: data.jsonl}\n"
        "method: {targets: [q_proj, o_proj]}\ntraining: {steps: 3, batch_size: 4}\n"
    )
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run")
    export_run(run, tmp_path / "export", ["q8_0", "merged", "f32"], quiet())
    said = json.loads((tmp_path / "export" / "certificate.json").read_text())
    assert said["merge"]["streamed"] and said["files"][0]["passed"]
    exact = next(file for file in said["files"] if file["format"] == "f32")
    assert exact["passed"] and exact["certificate"]["limits"]["divergence"] == certificate.EIGHT.divergence
    assert any("8 bits" in note for note in exact["notes"])
    file = GgufFile(tmp_path / "export" / "oss-q8_0.gguf")
    for name, stored in blocks.items():
        assert file.raw(name).tobytes() == np.ascontiguousarray(stored).tobytes()


def test_merged_and_quantised_again_by_choice(run, tmp_path):
    """A base in NF4, its adapter merged: in full, and back into NF4 as plain transformers opens it."""
    pytest.importorskip("bitsandbytes", reason='install "afina[qlora]"')
    place = Path(run).parent
    changes = ["model.quantization=nf4", "training.steps=40", "name=four"]
    tuned = afina.train(place / "recipe.yaml", tmp_path / "run", changes)
    export = export_run(tuned, tmp_path / "export", ["merged", "nf4", "f32"], quiet())
    export.verify()
    said = json.loads((tmp_path / "export" / "certificate.json").read_text("utf-8"))
    assert said["merge"]["streamed"] and said["merge"]["divergence"] < 1e-6
    (four, plain) = said["files"]
    assert four["format"] == "nf4" and four["passed"] and plain["passed"]
    assert four["certificate"]["divergence"] > 10 * plain["certificate"]["divergence"]
    assert not (tmp_path / "export" / nf4.PLAIN).exists()
    assert "Take the merged folder" in four["notes"][-1]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "nf4")
    assert opened.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert opened.model.layers[0].mlp.down_proj.weight.dtype == torch.uint8
    size = sum(path.stat().st_size for path in (tmp_path / "export" / "nf4").glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in (tmp_path / "export" / "merged").glob("*.safetensors")) / 2
    again = export_run(tuned, tmp_path / "again", ["nf4"], quiet())
    assert [entry["format"] for entry in again.manifest["exports"]] == ["nf4"]


def test_nf4_that_is_not_the_model_is_refused(run, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason='install "afina[qlora]"')
    monkeypatch.setitem(certificate.LIMITS, "nf4", certificate.Limits(1e-9))
    with pytest.raises(ProofError, match="is not the model"):
        export_run(run, tmp_path / "export", ["nf4"], quiet())
    assert not (tmp_path / "export").exists()
    said = json.loads((tmp_path / "export-failed" / "certificate.json").read_text("utf-8"))
    assert [file["passed"] for file in said["files"]] == [False]


def test_a_quantised_base_is_quantised_again_from_its_plain_weights(run, tmp_path, monkeypatch):
    """On the steps of its blocks' scales the training would be rounded away."""
    pytest.importorskip("bitsandbytes", reason='install "afina[qlora]"')
    place = Path(run).parent
    tuned = afina.train(place / "recipe.yaml", tmp_path / "run", ["model.quantization=nf4", "name=four"])

    def away(folder: str) -> float:
        return export_run(tuned, tmp_path / folder, ["nf4"], quiet()).manifest["exports"][0]["certificate"][
            "divergence"
        ]

    plain = away("plain")
    monkeypatch.setattr(nf4, "weights_of", lambda *_given: None)
    monkeypatch.setitem(certificate.LIMITS, "nf4", certificate.Limits(1e9, 0.0))
    assert away("steps") > 1.5 * plain


def test_prompts_that_leave_no_room_for_an_answer_are_not_asked(tmp_path):
    """Of GPT-2, whose positions are a table that ends, they cost the whole export."""
    base = save_base(tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(base)
    build("gpt2", vocab_size=len(tokenizer), eos_token_id=2, n_positions=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    long, short = [("soup " * 24, "good")] * 3, [("The film is dull.", "bad")]
    write_rows(tmp_path / "train.jsonl", [*long, *short])
    write_rows(tmp_path / "long.jsonl", long)
    recipe = "name: a\nmodel: {base: base, max_length: 64}\ndata: {train: train.jsonl, validation: 0}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "training: {steps: 1}\nexport: {formats: [merged]}\n", "utf-8")
    run = afina.train(tmp_path / "recipe.yaml", tmp_path / "run")
    entry = export_run(run, tmp_path / "export", ["merged"], quiet()).manifest["exports"][0]
    assert entry["format"] == "merged"
    tuned = reopen(run, "fp32")
    assert [one.prompt[0].content for one in room.to_ask(tuned)] == ["The film is dull."]
    data = tuned.recipe.data.model_copy(update={"train": "long.jsonl"})
    only_long = replace(tuned, recipe=tuned.recipe.model_copy(update={"data": data}))
    assert [one.prompt[0].content for one in room.to_ask(only_long)] == ["soup soup soup soup soup soup so"]
