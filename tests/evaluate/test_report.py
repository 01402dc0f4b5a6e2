"""The page about a run: what it says agrees with the folder, what it holds is safe, and a real browser shows it."""

import hashlib
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.ext import babel_extract
from PIL import Image

from afina.evaluate import report
from afina.evaluate.metrics import mcnemar, per_label, shares
from afina.recipe.schema import Recipe

LABELS = ["positiva", "neutra", "negativa"]
OPENINGS = {
    "positiva": ["El pan estaba recién hecho y el trato fue encantador.", "La batería aguanta dos días largos."],
    "neutra": ["Llegó el martes, como decía el pedido.", "Es una silla: tiene cuatro patas y un respaldo."],
    "negativa": ["Tres semanas de retraso y nadie contesta.", "Se rompió la cremallera el primer día."],
}
ENDINGS = ["Repetiré.", "Lo compré para mi madre.", "El precio era el normal.", "Pedí el modelo azul.", "Sin más."]


def sample_run(folder: Path, **changes: Any) -> Path:
    """A run folder as train, eval and export leave it, with realistic figures; `changes` go into the manifest."""
    run = folder / "runs" / "opiniones"
    for part in ("adapter", "evaluation", "export"):
        (run / part).mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "name": "opiniones",
            "model": {"base": "Qwen/Qwen3-0.6B"},
            "data": {"train": "data/train.jsonl", "too_long": "reject"},
            "tasks": [{"name": "sentiment", "kind": "classification", "data": "data/test.jsonl", "labels": LABELS}],
        }
    ).resolved()
    records = curve()
    write_lines(run / "metrics.jsonl", records)
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    manifest = {
        "format": 1,
        "kind": "run",
        "made": "2026-03-14T15:09:26+00:00",
        "parents": [
            {"role": "base", "name": "Qwen/Qwen3-0.6B", "sha256": digest("base")},
            {"role": "data", "name": "/home/ana/secret-project/data/train.jsonl", "sha256": digest("train")},
        ],
        "versions": {"python": "3.11.2", "platform": "Linux-6.1-x86_64", "afina": "0.1.0", "torch": "2.11.0"},
        "recipe": recipe,
        "seed": 42,
        "hardware": "CPU, fp32",
        "engine": "reference (transformers + PEFT), packed attention",
        "data": {
            "rows": 1212,
            "train": 1080,
            "validation": 120,
            "rejected": [
                {"file": "/home/ana/secret-project/data/train.jsonl", "line": 17 + 31 * number, "reason": reason}
                for number, reason in enumerate(["1310 tokens, 1024 fit", "the answer is cut away"] * 6)
            ],
            "files": [{"role": "data", "name": "/home/ana/data/train.jsonl", "sha256": digest("train")}],
        },
        "training": {
            "steps": len(losses),
            "samples": 1080,
            "tokens": 118_640,
            "learnt_tokens": 8_232,
            "seconds": 187.3,
            "tokens_per_second": 633.4,
            "peak_memory_bytes": 3_492_000_000,
            "trainable_parameters": 10_092_544,
            "parameters": 606_142_464,
            "first_loss": losses[0],
            "final_loss": losses[-1],
            "validation_loss": 0.412,
        },
        "files": {
            "adapter/adapter_model.safetensors": {"sha256": digest("a"), "bytes": 40_422_208},
            "adapter/tokenizer.json": {"sha256": digest("t"), "bytes": 11_422_654},
            "metrics.jsonl": {"sha256": digest("m"), "bytes": 31_204},
        },
        **changes,
    }
    write_json(run / "manifest.json", manifest)
    result, predictions = sentiment()
    write_json(run / "evaluation" / "evaluation.json", {"tasks": [result]})
    write_lines(run / "evaluation" / "predictions.jsonl", predictions)
    write_json(
        run / "export" / "manifest.json", {"exports": [export("f16", 1_198_182_944, 8), export("q8_0", 639_446_688, 7)]}
    )
    return run


def curve(steps: int = 204) -> list[dict[str, Any]]:
    """Records of metrics.jsonl: a falling loss with noise, warm-up and cosine, four validations."""
    chance = random.Random(7)
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise = chance.gauss(0, 0.16) * math.exp(-step / 110)
        records.append(
            {
                "kind": "step",
                "step": step,
                "epoch": round(3 * step / steps, 3),
                "loss": round(max(0.05, 2.7 * math.exp(-step / 32) + 0.34 + noise), 4),
                "grad_norm": 1.1,
                "learning_rate": 2e-4 * min(1, step / 6) * (1 + math.cos(math.pi * step / steps)) / 2,
                "tokens": 581,
                "learnt": 40,
                "seconds": 0.91,
            }
        )
        if step % (steps // 4) == 0:
            held_out = {51: 0.934, 102: 0.517, 153: 0.431}.get(step, 0.412)
            records.append({"kind": "validation", "step": step, "loss": held_out})
    return records


def sentiment() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluated task of 120 samples, marked by the project's own metrics, and its predictions."""
    chance = random.Random(3)
    expected = [LABELS[number % 3] for number in range(120)]
    answers = {
        "base": [chance.choice(["positiva", "positiva", "neutra", label]) for label in expected],
        "tuned": [label if chance.random() < 0.88 else chance.choice(LABELS) for label in expected],
    }
    right = {name: [a == b for a, b in zip(given, expected, strict=True)] for name, given in answers.items()}
    fixed = sum(after and not before for before, after in zip(right["base"], right["tuned"], strict=True))
    broken = sum(before and not after for before, after in zip(right["base"], right["tuned"], strict=True))
    chance_of = mcnemar(fixed, broken)
    result = {
        "name": "sentiment",
        "kind": "classification",
        "samples": 120,
        "systems": {
            name: {**shares(right[name]), "seconds": 6.2, **per_label(expected, given, LABELS)}
            for name, given in answers.items()
        },
        "fixed": fixed,
        "broken": broken,
        "p_value": chance_of,
        "verdict": f"Tuned is better: {fixed} answers fixed, {broken} broken (p = {chance_of:.2g}).",
    }
    predictions = [
        {
            "task": "sentiment",
            "sample": number,
            "where": f"/home/ana/secret-project/data/test.jsonl:{number + 1}",
            "prompt": "¿Positiva, neutra o negativa?\n"
            + OPENINGS[label][number // 3 % 2]
            + " "
            + ENDINGS[number % len(ENDINGS)],
            "expected": label,
            **{name: given[number] for name, given in answers.items()},
            "right": {name: given[number] == label for name, given in answers.items()},
        }
        for number, label in enumerate(expected)
    ]
    return result, predictions


def export(kind: str, size: int, equal: int) -> dict[str, Any]:
    """An exported file, asked eight questions of which `equal` gave the model's answer."""
    checks = [
        {
            "prompt": OPENINGS["positiva"][0],
            "model": "positiva",
            "gguf": "positiva" if number < equal else "neutra",
            "equal": number < equal,
        }
        for number in range(8)
    ]
    return {"file": f"opiniones-{kind}.gguf", "format": kind, "bytes": size, "sha256": digest(kind), "checks": checks}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


@dataclass
class Page(HTMLParser):
    """What a browser would read: text, elements with their attributes, and whether every element was closed."""

    text: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("dd", "td", "th", "dt"):
            self.text += " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.replace("\u202f", "").split())


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == [], f"left open: {page.open}"
    return page


def test_numbers_shown_are_those_of_the_folder(tmp_path):
    run = sample_run(tmp_path)
    assert report.draw(run) == run / "report.html"
    words = parsed(run / "report.html").words
    task = json.loads((run / "evaluation" / "evaluation.json").read_bytes())["tasks"][0]
    for system in task["systems"].values():
        low, high = system["interval"]
        for shown in (
            f"{system['accuracy']:.1%}",
            f"{100 * low:.1f}–{100 * high:.1f}%",
            f"{system['f1_macro']:.3f}",
            *(f"{figure['f1']:.3f}" for figure in system["per_label"].values()),
            *(str(count) for line in system["confusion"] for count in line),
        ):
            assert shown in words, shown
    assert f"Fixed {task['fixed']} " in words and f"Broken {task['broken']} " in words
    assert task["verdict"] in words
    for shown in (
        "1212 rows = 1080 to learn + 120 for validation + 12 rejected",
        "3 min 07 s",
        "633 tokens/s",
        "3.3 GiB",
        "10092544 1.7% of 606142464",
        "49.4 MiB",
        "8 of 8 ✓",
        "7 of 8",
        "609.8 MiB",
        "LoRA, rank 16",
        "…/data/train.jsonl:17",
        "learning_rate: 0.0002",
        digest("train"),
    ):
        assert shown in words, shown
    assert "do not add up" not in words and "count different right answers" not in words
    assert "secret-project" not in words, "where the maker's home lies is nobody's business"


def test_page_is_self_contained_and_well_formed(tmp_path):
    page = parsed(report.draw(sample_run(tmp_path)))
    ids = [attributes["id"] for _tag, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, name, target)
            if target and target.startswith("#"):
                assert target[1:] in ids, target
    text = (tmp_path / "runs/opiniones/report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import|https?://|[\"'(]//", text)


def test_page_is_accessible(tmp_path):
    page = parsed(report.draw(sample_run(tmp_path)))
    tags = [tag for tag, _attributes in page.elements]
    assert tags.count("h1") == 1 and tags.count("main") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert dict(page.elements)["html"]["lang"] == "en"
    pictures = [attributes for _tag, attributes in page.elements if attributes.get("role") == "img"]
    assert len(pictures) == 5 and all(picture["aria-label"] for picture in pictures)
    assert all(attributes["aria-hidden"] == "true" for tag, attributes in page.elements if tag == "svg")
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")


def test_same_folder_same_page(tmp_path):
    run = sample_run(tmp_path)
    first = report.draw(run).read_bytes()
    assert report.draw(run).read_bytes() == first


EVIL = "</text></svg><script>alert(1)</script><img src=x onerror=\"alert('2')\">$\\frac{{ 7*7 }}&amp;"


def test_everything_from_data_is_escaped(tmp_path):
    recipe = {"name": EVIL, "model": {"base": EVIL}, "method": {"name": "lora", "rank": EVIL}, "x": EVIL}
    changes = {key: EVIL for key in ("hardware", "engine", "seed", "made")}
    run = sample_run(
        tmp_path,
        recipe=recipe,
        data={"rows": 1, "rejected": [{"file": EVIL, "line": 1, "reason": EVIL}], "files": [EVIL]},
        parents=[{"role": EVIL, "name": EVIL, "sha256": EVIL}],
        versions={EVIL: EVIL},
        files={EVIL: {"sha256": EVIL, "bytes": 1}, "adapter/" + EVIL: {"bytes": 1}},
        **changes,
    )
    figures = {**shares([True, False]), **per_label([EVIL, "b"], [EVIL, EVIL], [EVIL, "b"])}
    task = {"name": EVIL, "kind": EVIL, "samples": 2, "systems": {"base": figures, "tuned": figures}, "verdict": EVIL}
    row = {"task": EVIL, "sample": 0, "where": EVIL, "prompt": EVIL, "expected": EVIL, "base": "b", "tuned": EVIL}
    write_json(run / "evaluation" / "evaluation.json", {"tasks": [task]})
    write_lines(run / "evaluation" / "predictions.jsonl", [row, {**row, "base": EVIL, "tuned": "b"}])
    entry = {"file": EVIL + ".gguf", "format": EVIL, "bytes": 1, "sha256": EVIL}
    check = {"prompt": EVIL, "model": EVIL, "gguf": EVIL, "equal": False}
    write_json(run / "export" / "manifest.json", {"exports": [{**entry, "checks": [check]}]})
    page = parsed(report.draw(run))
    tags = {tag for tag, _attributes in page.elements}
    assert not tags & {"script", "img"}
    assert not [name for _tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20, "shown as it is, not obeyed and not dropped"
    assert "{{ 7*7 }}" in page.text and "49" not in re.sub(r"[0-9a-f]{64}", "", page.words)


@pytest.mark.parametrize("kept", [(), ("metrics.jsonl",), ("manifest.json",), ("evaluation",), ("export",)])
def test_every_part_is_optional(tmp_path, kept):
    run = sample_run(tmp_path)
    for path in run.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = parsed(report.draw(run))
    assert "opiniones" in page.words
    assert ("not finished" in page.words) == (kept not in [("manifest.json",), ("evaluation",)])
    targets = {attributes.get("id") for _tag, attributes in page.elements}
    assert ("learning" in targets) == ("metrics.jsonl" in kept)
    assert ("evaluation" in targets) == ("evaluation" in kept)
    assert ("exports" in targets) == ("export" in kept)
    assert ("data" in targets) == ("manifest.json" in kept)
    assert "next" not in targets, "nobody said what could be wanted"


def test_not_evaluated_yet_says_so_and_what_can_be_wanted_is_shown(tmp_path):
    run = sample_run(tmp_path)
    shutil.rmtree(run / "evaluation")
    shutil.rmtree(run / "export")
    words = parsed(report.draw(run, [("Measure it", "afina eval 'runs/my <run>'"), ("Talk", "afina chat x")])).words
    assert "The loss went from 2.92 to 0.32 in 204 steps; how good the answers are was not measured yet." in words
    assert "afina eval 'runs/my <run>'" in words and "afina chat x" in words


@pytest.mark.parametrize(
    "metrics",
    [
        b"",
        b"\n\n",
        b'{"kind":"step","step":1,"loss":NaN,"learning_rate":Infinity}\n{"kind":"step","step":2,"loss":null}\n',
        b'{"kind":"step"}\n[1]\n7\n{"kind":"validation","loss":"x","step":[]}\n{"kind":"st',
        b'{"kind":"step","step":1,"loss":1e999,"learning_rate":-1}\n{"kind":"step","loss":1' + b"0" * 400 + b"}\n",
        b"\xff\xfe\x00",
    ],
)
def test_metrics_of_any_kind_make_a_page(tmp_path, metrics):
    run = sample_run(tmp_path)
    (run / "metrics.jsonl").write_bytes(metrics)
    words = parsed(report.draw(run)).words
    assert "nan" not in words.lower().split() and "inf" not in words.lower().split()
    if b"NaN" in metrics:
        assert "Steps whose loss is not a number: 2" in words


JUNK = [
    *("null", "[]", "{", '"x"', '{"tasks":7,"exports":7,"recipe":7,"training":[],"files":[]}'),
    '{"tasks":[null,{"systems":{"base":{"interval":[0.1],"labels":["a"],"confusion":[[1,2],3],"per_label":{"a":5}}}}],'
    '"exports":[{"checks":[1,{}]}],"data":{"rows":NaN,"rejected":[{}],"files":[1]},"files":{"adapter/x":1},'
    '"recipe":{"tasks":[1]},"training":{"seconds":-1e308,"parameters":0,"trainable_parameters":1}}',
]


@pytest.mark.parametrize("junk", JUNK)
def test_files_of_another_shape_make_a_page(tmp_path, junk):
    run = sample_run(tmp_path)
    for name in ("manifest.json", "evaluation/evaluation.json", "export/manifest.json"):
        (run / name).write_text(junk)
    (run / "evaluation/predictions.jsonl").write_text('{"task":"","expected":1,"base":null,"tuned":{}}\n' + junk)
    words = parsed(report.draw(run)).words
    assert ("cannot be read and was left out" in words) == (junk == "{")


def test_lone_surrogates_and_controls_do_not_stop_the_page(tmp_path):
    run = sample_run(tmp_path)
    for name in ("evaluation.json", "predictions.jsonl"):
        path = run / "evaluation" / name
        path.write_text(
            path.read_text(encoding="utf-8").replace("positiva", "\\ud800\\u0000ya\\n日本"), encoding="utf-8"
        )
    assert "日本" in parsed(report.draw(run)).text


def test_files_that_disagree_are_told(tmp_path):
    run = sample_run(tmp_path)
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest["data"]["rows"] += 3
    write_json(run / "manifest.json", manifest)
    lines = (run / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "evaluation" / "predictions.jsonl").write_text("\n".join(lines[:-7]), encoding="utf-8")
    words = parsed(report.draw(run)).words
    assert "rows not accounted for: 3" in words
    assert "count different right answers" in words


def test_everyone_who_was_asked_is_shown(tmp_path):
    """Base, tuned and two files: figures, intervals, problems, comparisons, parts; in Markdown and as JSON too."""
    run = sample_run(tmp_path)
    task, rows = sentiment()
    base = task["systems"]["base"]
    made = {**base, **shares([True] * 99 + [False] * 21), "value": 99 / 120, "file_bytes": 4_321_000}
    made |= {"problems": {"empty": 3, "cut off": 2}, "unanswered": 1, "reasons": ["it <went> away"], "unasked": 4}
    task["systems"] |= {"q8_0": made, "q4_k_m": {**made, "areas": {"facts (en)": {"right": 7, "of": 12}}}}
    verdict = "No difference between tuned and q8_0 that chance would not explain (p = 1)."
    task["comparisons"] = [{"before": "tuned", "after": "q8_0", "verdict": verdict, "p_value": 1.0}]
    lost = {"name": "lost", "kind": "perplexity", "measure": "perplexity", "samples": 3}
    lost["systems"] = {"base": {"value": None, "interval": None}, "q8_0": {"value": 12.5, "interval": [11.0, 14.25]}}
    write_json(run / "evaluation" / "evaluation.json", {"tasks": [task, lost]})
    write_lines(run / "evaluation" / "predictions.jsonl", rows)
    ratings = {"raters": ["ana", "luis"], "scores_alpha": 0.7312, "pairs_alpha": None}
    ratings["scores"] = {"tuned": {"mean": 4.25, "interval": [4.0, 4.5], "ratings": 8, "items": 4, "counts": {"5": 2}}}
    ratings["pairs"] = [{"left": "base", "right": "tuned", "left_preferred": 1, "right_preferred": 9, "ties": 2}]
    write_json(run / "ratings.json", ratings)
    words = parsed(report.draw(run)).words
    for shown in ("q8_0", "q4_k_m", "82.5%", "4.1 MiB", verdict, "3 empty, 2 cut off", "it <went> away", "7 / 12"):
        assert shown in words, shown
    for shown in ("12.50", "11.00–14.25", "4.25", "0.73", "Tuned was preferred 9 times, Base 1 times, 2 ties"):
        assert shown in words, shown
    plain = (run / "report.md").read_text("utf-8")
    assert verdict in plain and "| q8_0 | 82.5% |" in plain and "12.50" in plain
    assert "3 empty, 2 cut off; 1 without an answer: it <went> away; 4 not asked, the time was up" in plain
    numbers = json.loads((run / "report.json").read_text("utf-8"))
    assert numbers["tasks"][0]["systems"]["q8_0"]["accuracy"] == 99 / 120
    assert numbers["tasks"][1]["systems"]["base"]["value"] is None and numbers["ratings"]["raters"] == 2


def test_json_answers_are_marked_by_their_field(tmp_path):
    """Spelling apart, the right field counts: as the evaluation marks, so does the page."""
    run = sample_run(tmp_path)
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest["recipe"]["tasks"] = [{"name": "intents", "kind": "json", "field": "intent"}]
    write_json(run / "manifest.json", manifest)
    system = {"accuracy": 0.5, "interval": [0.1, 0.9], "correct": 1, "seconds": 1.0}
    system |= {"answered": 2, "parsed": 2, "of_schema": 1, "steps": 3, "right_steps": 2}
    task = {"name": "intents", "kind": "json", "samples": 2, "systems": {"base": system, "tuned": system}}
    rows = [
        {"task": "intents", "expected": '{"intent": "a", "n": 1}', "base": "no", "tuned": '{"n": 2, "intent": "a"}'},
        {"task": "intents", "expected": '{"intent": "b"}', "base": '{ "intent":"b" }', "tuned": '{"intent": "c"}'},
    ]
    rows[0]["right"], rows[1]["right"] = {"base": False, "tuned": True}, {"base": True, "tuned": False}
    write_json(run / "evaluation" / "evaluation.json", {"tasks": [task]})
    write_lines(run / "evaluation" / "predictions.jsonl", rows)
    words = parsed(report.draw(run)).words
    assert "Fixed 1 50.0% Broken 1 50.0%" in words
    assert "count different right answers" not in words
    assert "(a JSON object) 2 / 2 2 / 2 (of the schema) 1 / 2 1 / 2" in words
    assert "(calculations shown) 2 / 3 2 / 3" in words
    assert "| (of the schema) | 1 / 2 | 1 / 2 |" in (run / "report.md").read_text("utf-8")


def test_examples_are_bounded(tmp_path):
    run = sample_run(tmp_path)
    row = {"task": "sentiment", "where": "a:1", "prompt": "p" * 50_000, "expected": "x", "base": "y", "tuned": "x"}
    row["right"] = {"base": False, "tuned": True}
    write_lines(run / "evaluation" / "predictions.jsonl", [row] * 400)
    path = report.draw(run)
    assert path.stat().st_size < 250_000
    assert "Fixed 12 of 400" in parsed(path).words


def test_every_sentence_of_the_template_can_be_translated():
    """Nothing is left in English: outside tags and expressions the template holds no letters."""
    template = Path(report.__file__).with_name(report.TEMPLATE)
    with template.open("rb") as file:
        messages = [message for _line, _function, message, _comments in babel_extract(file, ["_"], [], {})]
    assert "Exactly what was trained" in messages and all(isinstance(message, str) for message in messages)
    source = template.read_text(encoding="utf-8")
    assert source.count('_("') == len(messages)
    words = re.sub(r"(?s)<style>.*?</style>|\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", source)
    bare = re.sub(r"<[^<>]*>", "", words)
    assert re.findall(r"\w+", bare) == []


def test_spanish_where_the_user_reads_spanish(tmp_path, monkeypatch):
    monkeypatch.setenv("AFINA_LANG", "es")
    assert dict(parsed(report.draw(sample_run(tmp_path))).elements)["html"]["lang"] == "es"


WIDTHS = {"desktop": (1100, 3600), "phone": (390, 3600)}


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_a_real_browser_shows_it(tmp_path, device, theme):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    page = report.draw(sample_run(tmp_path))
    picture, (width, height) = tmp_path / "page.png", WIDTHS[device]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"]
    command += [f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == [], complaints
    with Image.open(picture) as image:
        seen = np.asarray(image.convert("RGB")).astype(int)
    assert seen.shape == (height, width, 3)
    paper = seen[0, 0]
    assert (paper.sum() < 150) == (theme == "dark"), paper
    inked = np.abs(seen - paper).sum(axis=2) > 0
    assert 0.3 < inked.any(axis=1).mean() < 0.98, "neither blank nor a wall"
    assert not inked[:, :8].any() and not inked[:, -8:].any(), "something runs over the edge"
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 50
