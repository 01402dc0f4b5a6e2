"""What goes wrong, by a newcomer or by the machine: one clear message, its status, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from journey.conftest import COMMAND
from journey.tiny import RECIPE, examples, row, save_base, write_rows
from small import spread
from transformers import AutoModelForCausalLM, Gemma2Config

from afina.train.resume import is_unfinished


@pytest.fixture
def place(world, tmp_path) -> Path:
    """A folder of its own with base, data and recipe, to be spoilt."""
    return Path(shutil.copytree(world, tmp_path / "place"))


def train(afina, place: Path, *overrides: str, status: int, out: str = "run") -> str:
    """Run and fail with `status`; returns what a person reads. Nothing may be left, nothing but our message shown."""
    before = {path for path in place.rglob("*")}
    ended = afina("run", place / "recipe.yaml", *overrides, "--out", place / out)
    assert ended.status == status, ended.out + ended.err
    assert ended.err.startswith("Error ") and "Traceback" not in ended.err and "mistake in afina" not in ended.err
    assert {path for path in place.rglob("*")} == before
    return ended.err


def test_a_missing_data_file(afina, place):
    error = train(afina, place, "data.train=nowhere.jsonl", status=3)
    assert "nowhere.jsonl" in error and str(place) in error


def test_an_empty_data_file(afina, place):
    (place / "train.jsonl").write_bytes(b"")
    assert "train.jsonl" in train(afina, place, status=3)
    (place / "train.jsonl").write_bytes(b"\n \n")
    assert "train.jsonl" in train(afina, place, status=3)


def test_all_bad_lines_are_told_in_one_pass_with_numbers_and_reasons(afina, place):
    lines = [row("The soup is great.", "good")] * 9
    lines[1] = '{"messages": [{"role": "user", "content": "cut'
    lines[3] = "[1, 2]"
    lines[6] = row("The soup is great.", " ")
    lines[8] = json.dumps({"messages": [{"role": "wizard", "content": "x"}]})
    (place / "train.jsonl").write_text("\n".join(lines), "utf-8")
    error = train(afina, place, status=3)
    for number in (2, 4, 7, 9):
        assert f"train.jsonl:{number}: " in error
    assert "4 of 9" in error


def test_a_sample_with_nothing_to_learn(afina, place):
    write_rows(place / "train.jsonl", [("The soup is great.", "good"), ("The soup is dull.", "\n")])
    assert "train.jsonl:2" in train(afina, place, status=3)
    (place / "open.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    write_rows(place / "train.jsonl", examples())
    error = train(afina, place, "model.chat_template=open.jinja", status=3)
    assert "would never stop" in error and "train.jsonl:1" in error and "chat template" in error


def test_a_sample_that_is_too_long_is_named_or_set_aside(afina, place):
    rows = [("The soup is great.", "good")] * 19 + [("The soup " * 100, "good")]
    write_rows(place / "train.jsonl", rows)
    error = train(afina, place, status=3)
    assert "train.jsonl:20" in error and "128" in error and "data.too_long" in error
    everything = ["data.too_long=reject", "tasks=[]", "export.formats=[]", "training.steps=2"]
    ended = afina("run", place / "recipe.yaml", *everything, "--out", place / "run")
    assert ended.status == 0
    assert f"{place / 'train.jsonl'}:20: " in ended.out and "1 rejected" in ended.out
    data = json.loads((place / "run" / "manifest.json").read_text())["data"]
    assert [entry["line"] for entry in data["rejected"]] == [20]
    assert data["rows"] == 20 == data["train"] + data["validation"] + 1


def test_nothing_left_to_learn(afina, place):
    write_rows(place / "train.jsonl", [("The soup " * 100, "good")] * 5)
    error = train(afina, place, "data.too_long=reject", "data.validation=0", status=3)
    assert "No sample is left" in error and "train.jsonl:5" in error


def test_labels_that_do_not_fit_are_told_before_training(afina, place):
    write_rows(place / "test.jsonl", [("The soup is great.", "good"), ("The soup is odd.", "perhaps")])
    assert "test.jsonl:2" in train(afina, place, status=3)
    (place / "test.jsonl").unlink()
    assert "test.jsonl" in train(afina, place, status=3)


@pytest.mark.parametrize("spoil", ["empty", "file", "name", "no weights", "no tokenizer", "cut"])
def test_a_model_folder_that_is_none(afina, place, spoil):
    base, name = place / "base", "base"
    if spoil == "empty":
        shutil.rmtree(base)
        base.mkdir()
    elif spoil == "file":
        name = "train.jsonl"
    elif spoil == "name":
        name = "nobody/no-such-model"
    elif spoil == "no weights":
        (base / "model.safetensors").unlink()
    elif spoil == "no tokenizer":
        for file in base.glob("token*"):
            file.unlink()
    elif spoil == "cut":
        content = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(content[:1000])
    for formats in ("[merged]", "[q8_0]"):
        error = train(afina, place, f"model.base={name}", f"export.formats={formats}", status=4)
        assert name in error


def test_a_base_that_cannot_become_gguf_is_told_before_training(afina, place):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
    config = Gemma2Config(vocab_size=400, num_key_value_heads=2, query_pre_attn_scalar=8, **sizes)
    config.architectures = ["NobodysForCausalLM"]
    spread(AutoModelForCausalLM.from_config(config)).save_pretrained(place / "base")
    file = place / "base" / "config.json"
    file.write_text(file.read_text().replace("gemma2", "nobodys").replace("Gemma2", "Nobodys"))
    error = train(afina, place, status=4)
    assert "nobodys" in error.lower() and "export.formats" in error


def test_a_context_longer_than_the_models(afina, place):
    error = train(afina, place, "model.max_length=4096", status=2)
    assert "4096" in error and "256" in error


def test_a_recipe_with_mistakes(afina, place):
    recipe = RECIPE.replace("rank: 16", "rnak: 16").replace("steps: 40", "steps: forty")
    (place / "recipe.yaml").write_text(recipe, "utf-8")
    error = train(afina, place, status=2)
    assert "rank" in error and "recipe.yaml:9" in error and "forty" in error


def test_a_loss_that_is_no_number(afina, place):
    overrides = ["training.learning_rate=1e30", "training.clip_norm=null", "tasks=[]"]
    ended = afina("train", place / "recipe.yaml", *overrides, "--out", place / "run")
    assert ended.status == 1 and "Traceback" not in ended.err
    assert "not a number" in ended.err and "train.jsonl:" in ended.err and "learning_rate" in ended.err
    assert is_unfinished(place / "run")


def test_an_existing_run(afina, place):
    (place / "run").mkdir()
    (place / "run" / "diary.txt").write_text("mine")
    error = afina("train", place / "recipe.yaml", "--out", place / "run")
    assert error.status == 5 and "exists already" in error.err and "--out" in error.err
    (place / "link").symlink_to(place / "nowhere")
    assert afina("train", place / "recipe.yaml", "--out", place / "link").status == 5


def test_an_output_that_is_no_folder(afina, place):
    error = train(afina, place, status=5, out="recipe.yaml/run")
    assert "recipe.yaml" in error and "--out" in error


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(afina, place):
    (place / "closed").mkdir(mode=0o500)
    assert "closed" in train(afina, place, status=5, out="closed/run")


@pytest.mark.parametrize("verb", [["eval"], ["export", "--format", "f32"]])
def test_a_run_folder_that_is_none(afina, place, verb):
    for folder in (place / "nowhere", place / "base", place / "recipe.yaml"):
        ended = afina(verb[0], folder, *verb[1:])
        assert ended.status == 1 and str(folder) in ended.err and "Traceback" not in ended.err
    (place / "manifest.json").write_text('{"kind": "run", "files": {}, "parents": []}')
    ended = afina(verb[0], place, *verb[1:])
    assert ended.status == 1 and "manifest" in ended.err


def test_chat_with_nothing(afina, place):
    for source, status in ((place / "nowhere", 4), (place / "train.jsonl", 4), (place / "no.gguf", 4)):
        ended = afina("chat", source, "--prompt", "hi")
        assert ended.status == status and str(source) in ended.err and "Traceback" not in ended.err


def test_flags_that_are_none(afina, place):
    assert afina("export", place, "--no-such-flag").status == 2
    assert afina("train").status == 2
    assert afina("trian", place).status == 2
    assert afina("train", place / "recipe.yaml", "no-override").status == 2


def test_debug_shows_where_it_happened(afina, place):
    ended = afina("train", place / "recipe.yaml", "data.train=nowhere.jsonl", "--out", place / "run", "--debug")
    assert ended.status == 3 and "Traceback" in ended.err and "nowhere.jsonl" in ended.err


def wait_for(process: subprocess.Popen, sign: str) -> None:
    """Read until it is said."""
    for line in process.stdout:
        if sign in line:
            return
    raise AssertionError(process.communicate()[1])


def wait_for_training(process: subprocess.Popen) -> None:
    """Read until the first step is reported."""
    wait_for(process, '"step": 1')


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


LONG = ["training.steps=100000", "tasks=[]", "export.formats=[]", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_is_nothing_finished(start, world, tmp_path, number):
    process = start("run", "recipe.yaml", *LONG, "--out", tmp_path / "run")
    wait_for_training(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    event = json.loads(out.splitlines()[-1])
    assert event["event"] == "error" and "is saved" in event["message"] and "Traceback" not in err
    assert "same command again" in event["hint"]
    assert names(tmp_path / "run") == {"checkpoints", "metrics.jsonl", "state.json"} and is_unfinished(tmp_path / "run")


@pytest.mark.slow
def test_what_a_killed_run_left_is_gone_on_with_by_the_next(start, world, tmp_path):
    often = [*LONG, "training.checkpoint_minutes=1e-6"]
    process = start("train", "recipe.yaml", *often, "--out", tmp_path / "run")
    wait_for_training(process)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    assert is_unfinished(tmp_path / "run") and not (tmp_path / "run" / "manifest.json").exists()
    process = start("train", "recipe.yaml", *often, "--out", tmp_path / "run")
    wait_for(process, '"event": "resumed"')
    other = start("train", "recipe.yaml", *often, "--out", tmp_path / "run")
    out, _err = other.communicate(timeout=60)
    assert other.returncode == 5 and str(process.pid) in json.loads(out.splitlines()[-1])["message"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    ended = start("train", "recipe.yaml", *often, "training.learning_rate=3e-3", "--out", tmp_path / "run")
    out, _err = ended.communicate(timeout=60)
    assert (
        ended.returncode == 5 and "training.learning_rate: 0.005 → 0.003" in json.loads(out.splitlines()[-1])["message"]
    )


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from afina.cli.main import main
main()
"""


@pytest.mark.slow
def test_an_output_that_cannot_grow(world, tmp_path):
    """The operating system refuses to make a file larger, while safetensors writes the weights."""
    arguments = ["20000", "train", "recipe.yaml", "tasks=[]", "training.steps=4", "--out", tmp_path / "run"]
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        cwd=world,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    assert "Traceback" not in ended.stderr and str(tmp_path) in ended.stderr and "too large" in ended.stderr.lower()
    assert is_unfinished(tmp_path / "run") and not list(tmp_path.rglob("*.partial*"))


@pytest.mark.slow
def test_a_full_disk(world, tmp_path):
    """A real one, of 100 KiB, where this user may mount one."""
    script = 'mount -t tmpfs -o size=100k none "$1" && shift && exec "$@"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("no disk of its own can be mounted here")
    check = 'find "$0" -name "*.partial*" -o -name manifest.json | wc -l; exit $status'
    command = " ".join(
        [*COMMAND, "train", "recipe.yaml", "tasks=[]", "training.steps=4", "--out", str(tmp_path / "run")]
    )
    ended = subprocess.run(
        [*namespace, "sh", "-c", f"{command}; status=$?; {check}", str(tmp_path)],
        cwd=world,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    assert "disk is full" in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stdout.split()[-1] == "0"  # nothing half-written, nothing that looks finished


@pytest.mark.slow
def test_the_reader_of_the_output_may_leave(world, tmp_path):
    """`afina run ... | head -1`: the run ends quietly."""
    arguments = ["run", "recipe.yaml", "tasks=[]", "export.formats=[]", "training.steps=2000", "--json"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--out", str(tmp_path / "run")],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == 141 and process.stderr.read() == "" and is_unfinished(tmp_path / "run")


def test_a_base_saved_anew_is_the_same_base(world, tmp_path):
    """The world of these tests is the same at every build, so what they show does not change from run to run."""
    again = save_base(tmp_path / "base")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (world / "base" / file).read_bytes()
