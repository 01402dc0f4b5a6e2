"""What is advised after a run: the same in the terminal and on the report, and nothing that could not work."""

import json
from pathlib import Path
from typing import Any

import pytest

from afina.recipe.schema import Recipe
from afina.summary import next_commands

TASK = {"name": "t", "kind": "exact", "data": "a.jsonl"}
RUN = "'runs/my run'"


def finished(folder: Path, **settings: Any) -> Path:
    """A run folder as training seals it, as far as advice looks at it."""
    run = folder / "runs" / "my run"
    run.mkdir(parents=True)
    asked = {"name": "x", "model": {"base": "afina/tiny"}, "data": {"train": "a.jsonl"}, **settings}
    facts = {"format": 1, "kind": "run", "files": {}, "recipe_folder": str(folder)}
    recipe = Recipe.model_validate(asked).resolved()
    (run / "manifest.json").write_text(json.dumps({**facts, "recipe": recipe}))
    return run


def advised(run: Path) -> list[str]:
    return [command for _purpose, command in next_commands(run, Path(run.parent.name, run.name))]


def test_after_training_alone(tmp_path):
    run = finished(tmp_path, tasks=[TASK])
    assert advised(run) == [
        f"afina chat {RUN} --beside-base",
        f"afina eval {RUN}",
        f"afina export {RUN} --format q8_0",
    ]


def test_what_is_done_is_not_advised(tmp_path):
    run = finished(tmp_path, tasks=[TASK], method={"name": "full"})
    for place in ("evaluation/evaluation.json", "export/x-q8_0.gguf"):
        (run / place).parent.mkdir()
        (run / place).touch()
    assert advised(run) == [f"afina chat {RUN}", "afina chat 'runs/my run/export/x-q8_0.gguf'"]


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_learnt_prompts_become_no_file(tmp_path, method):
    assert advised(finished(tmp_path, method={"name": method})) == [f"afina chat {RUN} --beside-base"]


def test_a_base_that_llama_cpp_does_not_run_is_not_exported_to_gguf(tmp_path):
    """The report advised it, the terminal did not."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model_type": "opt", "architectures": ["OPTForCausalLM"]})
    )
    assert advised(finished(tmp_path, model={"base": "base"})) == [f"afina chat {RUN} --beside-base"]


def test_nothing_is_advised_of_what_is_not_finished(tmp_path):
    assert next_commands(tmp_path, tmp_path) == []


def test_the_report_has_what_the_terminal_says(tmp_path, monkeypatch):
    from afina import pipeline

    run = finished(tmp_path, tasks=[TASK])
    monkeypatch.chdir(tmp_path)
    pipeline._draw(Path("runs/my run"))
    page = (run / "report.html").read_text("utf-8").replace("&#39;", "'")
    assert all(f"<code>{command}</code>" in page for command in advised(run))
