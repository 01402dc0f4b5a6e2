"""Tasks of lm-eval, asked through our systems: the figures of its own run of the same model, from local files."""

import json
import sys
from pathlib import Path

import pytest
from journey.tiny import RECIPE, examples, lay_out, save_base
from small import CPU

from afina import pipeline
from afina.data.load_tokenizer import load_tokenizer
from afina.data.template import Renderer
from afina.errors import DataError, RecipeError, ResourceError
from afina.evaluate.answers import Answers
from afina.evaluate.measure import Sitting, prepare
from afina.evaluate.systems.asking import Continue, System, Weigh, until_first
from afina.evaluate.systems.gguf import GgufAnswering, Weighing
from afina.evaluate.systems.transformer import ModelAnswering, as_it_is
from afina.evaluate.tasks import lm_eval_tasks
from afina.export.gguf import write_gguf
from afina.model.load import load_model
from afina.recipe.schema import Task

CHOICE = """\
task: opinions_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.jsonl}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{question.strip()}}\\nOpinion:"
doc_to_choice: [good, bad]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """\
task: opinions_written
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {until: ["\\n", "."], do_sample: false, max_gen_toks: 9}
filter_list:
  - name: first-word
    filter:
      - {function: regex, regex_pattern: "(\\\\w)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
ROLLING = """\
task: opinions_text
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
LAST_WORD = """\
task: opinions_last
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{' ' + question.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
FILES = {"choice.yaml": CHOICE, "written.yaml": WRITTEN, "rolling.yaml": ROLLING, "last.yaml": LAST_WORD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("lm-eval")
    save_base(place / "base")
    rows = [{"question": question, "answer": answer} for question, answer in examples()[::3]]
    (place / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for name, text in FILES.items():
        (place / name).write_text(text, "utf-8")
    return place


@pytest.fixture(scope="module")
def parts(folder):
    return load_model(str(folder / "base"), CPU), Renderer(load_tokenizer(str(folder / "base")))


def task(name, **more):
    return Task(name=name, kind="lm-eval", benchmarks=[name], **more)


def asked_of(answering, asked, tmp_path):
    system = System("it", "model", "it", lambda: as_given(answering))
    sitting = Sitting([system], [asked], Answers(tmp_path / "answers.jsonl"))
    sitting.ask()
    results, rows = sitting.results()
    return results[0], rows


def as_given(answering):
    from contextlib import nullcontext

    return nullcontext(answering)


@pytest.mark.parametrize("name", FILES)
def test_figures_are_those_of_lm_eval_itself(folder, parts, tmp_path, name, monkeypatch):
    """The same model in lm-eval's own class for models of transformers, run by its own evaluator."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, renderer = parts
    asked = prepare(task(name), [], 0, folder)
    result, rows = asked_of(ModelAnswering(model, renderer, CPU, as_it_is), asked, tmp_path)
    (found,) = result["systems"]["it"]["lm_eval"].values()
    monkeypatch.chdir(folder)  # where its data files are looked for
    theirs = HFLM(pretrained=model, tokenizer=renderer.tokenizer.hf, batch_size=4)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    said = lm_eval.simple_evaluate(
        theirs, tasks=[next(iter(result["systems"]["it"]["lm_eval"]))], task_manager=manager, bootstrap_iters=0
    )
    (wanted,) = said["results"].values()
    assert found and result["samples"] == len(rows) == 27
    for key, value in found.items():
        assert value == pytest.approx(wanted[key], rel=1e-4), key


def test_a_gguf_file_is_asked_alike(folder, parts, tmp_path):
    pytest.importorskip("xllamacpp")
    model, renderer = parts
    file = tmp_path / "base.gguf"
    write_gguf(folder / "base", file, "f32", name="base")
    ours = ModelAnswering(model, renderer, CPU, as_it_is)
    requests = [
        Weigh("The soup is great.\nOpinion:", " good"),
        Weigh("The soup is ", "dull."),
        Weigh("", "The film is fine."),
        Continue("Question: The café is lovely.\nAnswer:", ("\n",), 8),
    ]
    found = []
    with Weighing(file, cache="f32") as llama:
        for system in (ours, GgufAnswering(llama, lambda messages: [])):
            answers = {}
            system.answer(requests, answers.__setitem__)
            found.append([answers[place] for place in range(len(requests))])
    for one, two in zip(*found, strict=True):
        assert one.text == two.text and one.tokens == two.tokens and not one.error
        assert one.scores[:1] == pytest.approx(two.scores[:1], rel=1e-4) and one.scores[1:] == two.scores[1:]


def test_a_recipe_asks_benchmarks_of_base_and_tuned_and_remembers(folder, tmp_path):
    lay_out(tmp_path, RECIPE)
    for name in (*FILES, "rows.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    benchmark = "tasks:\n  - {name: bench, kind: lm-eval, benchmarks: [choice.yaml, last.yaml], limit: 20}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("tasks:\n", benchmark), "utf-8")
    run = pipeline.train(tmp_path / "recipe.yaml", tmp_path / "run", ["export.formats=[]", "training.evaluate=[bench]"])
    pipeline.evaluate(run)
    first = (run / "answers.jsonl").stat().st_size
    pipeline.evaluate(run)
    assert (run / "answers.jsonl").stat().st_size == first
    bench = json.loads((run / "evaluation" / "evaluation.json").read_text("utf-8"))["tasks"][0]
    assert bench["samples"] == 20 and set(bench["systems"]) == {"base", "tuned"}
    for figures in bench["systems"].values():
        assert figures["answered"] == 20 and sum(area["of"] for area in figures["areas"].values()) == 20
    assert "opinions_choice" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: x\nprocess_docs: !function utils.run\n", "Tags such as !function"),
        (CHOICE.replace("metric: acc,", "metric: my_own,"), "my_own would run code"),
        (CHOICE + "include: other.yaml\n", "include would run code"),
        ("- a\n- b\n", "no task of lm-eval"),
        ("task: [x\n", "foreign.yaml"),
    ],
)
def test_a_task_file_runs_no_code(folder, text, says):
    (folder / "foreign.yaml").write_text(text, "utf-8")
    with pytest.raises(DataError, match=says) as caught:
        prepare(task("foreign.yaml"), [], 0, folder)
    assert str(caught.value.file) == str(folder / "foreign.yaml")


def test_a_template_runs_in_a_sandbox(folder):
    evil = CHOICE.replace("{{question.strip()}}", "{{ question.__class__.__mro__[1].__subclasses__() }}")
    (folder / "evil.yaml").write_text(evil.replace("opinions_choice", "evil"), "utf-8")
    with pytest.raises(DataError, match="evil"):
        prepare(task("evil.yaml"), [], 0, folder)


def test_what_is_not_there_is_told(folder, monkeypatch):
    with pytest.raises(RecipeError, match="knows no task nothing_like_it"):
        prepare(task("nothing_like_it"), [], 0, folder)
    gone = CHOICE.replace("rows.jsonl", "gone.jsonl")
    (folder / "gone.yaml").write_text(gone, "utf-8")
    with pytest.raises(DataError, match=r"gone\.yaml cannot be had"):
        prepare(task("gone.yaml"), [], 0, folder)
    lm_eval_tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match="not installed") as caught:
        prepare(task("arc_easy", limit=3), [], 0, folder)
    assert "afina[lm-eval]" in caught.value.hint
    lm_eval_tasks._manager.cache_clear()


def test_texts_are_cut_at_the_first_end():
    assert until_first("one\ntwo.three", (".", "\n")) == "one"
    assert until_first("one", ("", "x")) == "one"
