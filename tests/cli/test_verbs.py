"""The command line as a user meets it: a real process, its exit status, and what it says. No traceback unless asked."""

import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from afina.cli.phrases import phrases

ROOT = Path(__file__).parents[2]
SENTIMENT = ROOT / "recipes" / "sentiment.yaml"


def environment(**changes: str) -> dict[str, str]:
    """Ours, speaking English, on one thread."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "AFINA_", "PYTEST", "COVERAGE"))
    }
    return {**kept, "LANG": "en_US.UTF-8", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **changes}


def afina(*arguments: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "afina", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def is_calm(done: subprocess.CompletedProcess) -> bool:
    """One message, no traceback, nothing of libraries."""
    return "Traceback" not in done.stderr and 1 <= len(done.stderr.strip().splitlines()) <= 4


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["fly"], "No such command 'fly'"),
            (["train"], "Missing argument"),
            (["train", "--wings", "x.yaml"], "No such option"),
            (["chat", "x", "--temperature", "hot"], "temperature"),
            (["chat", "x", "--temperature", "-1"], "temperature"),
            (["export", "x", "--format", "docx"], "docx"),
        ],
    )
    def test_a_wrong_command_line_is_2(self, arguments, said):
        done = afina(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert is_calm(done)

    def test_machines_are_told_so_too(self):
        done = afina("train", "--wings", "x.yaml", "--json")
        assert done.returncode == 2
        assert done.stderr == ""
        event = json.loads(done.stdout)
        assert (event["event"], event["exit_status"]) == ("error", 2)
        assert "--wings" in event["message"]

    def test_the_version_and_the_help(self):
        import afina as package

        assert afina("--version").stdout == f"afina {package.__version__}\n"
        for verb in ("run", "init", "train", "eval", "export", "chat", "serve"):
            done = afina(verb, "--help")
            assert done.returncode == 0 and "--debug" in done.stdout and done.stderr == ""

    def test_a_reader_that_leaves_is_no_error(self):
        """`afina --help | true`: no traceback whatever the moment."""
        process = subprocess.Popen(
            [sys.executable, "-m", "afina", "init"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        process.wait(timeout=60)

    def test_no_character_ends_the_program(self):
        done = afina("--help", PYTHONIOENCODING="ascii", LANG="es_ES.UTF-8")
        assert done.returncode == 0
        assert "Traceback" not in done.stderr


class TestMistakes:
    def test_a_missing_recipe_is_2(self, tmp_path):
        done = afina("train", tmp_path / "nowhere.yaml")
        assert done.returncode == 2
        assert "nowhere.yaml" in done.stderr and "afina init" in done.stderr
        assert is_calm(done)

    def test_an_unknown_key_names_its_place_and_the_nearest_one(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("name: x\ndata:\n  train: a.jsonl\ntraning:\n  epochs: 1\n")
        done = afina("run", "recipe.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert "recipe.yaml:4:1" in done.stderr and "training" in done.stderr
        assert is_calm(done)

    def test_a_wrong_override_is_2(self, tmp_path):
        done = afina("train", SENTIMENT, "training.epochs=many", "--out", tmp_path / "run")
        assert done.returncode == 2
        assert "training.epochs" in done.stderr
        assert is_calm(done)

    def test_missing_data_is_3(self, tmp_path):
        done = afina("train", SENTIMENT, f"data.train={tmp_path / 'nowhere.jsonl'}", "--out", tmp_path / "run")
        assert done.returncode == 3
        assert "nowhere.jsonl" in done.stderr
        assert is_calm(done)
        assert list(tmp_path.iterdir()) == []

    def test_bad_rows_are_3_and_all_are_named(self, tmp_path):
        good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        (tmp_path / "data.jsonl").write_text(good + "{oops\n" + good + '{"messages": []}\n')
        done = afina("train", SENTIMENT, f"data.train={tmp_path / 'data.jsonl'}", "--out", tmp_path / "run")
        assert done.returncode == 3
        assert "data.jsonl:2" in done.stderr and "data.jsonl:4" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    def test_a_folder_that_is_no_model_is_4(self, tmp_path):
        (tmp_path / "model").mkdir()
        done = afina("train", SENTIMENT, f"model.base={tmp_path / 'model'}", "--out", tmp_path / "run")
        assert done.returncode == 4
        assert "model" in done.stderr
        assert is_calm(done)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.parametrize("verb", ["train", "run"])
    def test_an_existing_place_is_5_and_stays_as_it_is(self, tmp_path, verb):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("mine")
        done = afina(verb, SENTIMENT, "--out", tmp_path / "run")
        assert done.returncode == 5
        assert "exists already" in done.stderr and "--out" in done.stderr
        assert is_calm(done)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]

    def test_a_place_that_cannot_be_written_is_5(self, tmp_path):
        (tmp_path / "file").write_text("x")
        done = afina("train", SENTIMENT, "--out", tmp_path / "file" / "run")
        assert done.returncode == 5
        assert is_calm(done)

    @pytest.mark.parametrize("verb", ["eval", "export"])
    def test_a_folder_that_is_no_run_is_1(self, tmp_path, verb):
        done = afina(verb, tmp_path)
        assert done.returncode == 1
        assert "manifest.json" in done.stderr
        assert is_calm(done)

    def test_an_unknown_use_case_is_2(self, tmp_path):
        done = afina("init", "support-chta", cwd=tmp_path)
        assert done.returncode == 2
        assert "support-chat" in done.stderr
        assert list(tmp_path.iterdir()) == []


class TestTwins:
    def test_an_error_is_one_event_for_machines(self, tmp_path):
        done = afina("--json", "train", tmp_path / "nowhere.yaml")
        assert done.returncode == 2
        assert done.stderr == ""
        event = json.loads(done.stdout)
        assert event["event"] == "error" and event["exit_status"] == 2
        assert "nowhere.yaml" in event["message"] + str(event["file"])

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_debug_shows_the_traceback_and_the_message(self, tmp_path, place):
        words = ["train", str(tmp_path / "nowhere.yaml")]
        done = afina(*(["--debug", *words] if place == "before" else [*words, "--debug"]))
        assert done.returncode == 2
        assert "Traceback (most recent call last)" in done.stderr
        assert "RecipeError" in done.stderr and "Error The recipe" in done.stderr

    def test_init_is_told_both_ways(self, tmp_path):
        assert "support-chat" in afina("init", cwd=tmp_path).stdout
        assert "support-chat" in json.loads(afina("init", "--json", cwd=tmp_path).stdout)["names"]
        done = afina("init", "support-chat", "mine", "--json", cwd=tmp_path)
        assert done.returncode == 0
        assert json.loads(done.stdout)["event"] == "init"
        assert (tmp_path / "mine" / "recipe.yaml").is_file()


class TestSpanish:
    def test_messages_follow_the_locale(self, tmp_path):
        done = afina("train", tmp_path / "nowhere.yaml", LANG="es_ES.UTF-8")
        assert done.returncode == 2
        assert "no puede leerse" in done.stderr and "Indica un archivo de receta" in done.stderr

    def test_help_too(self):
        done = afina("--help", LANG="es_MX.UTF-8")
        assert "De un archivo de ejemplos a un modelo de lenguaje que responde" in done.stdout
        assert "Prepara una carpeta de proyecto" in done.stdout

    def test_what_typer_says_too(self):
        """Its headings and its own refusals, of the catalogue that we lend it."""
        shown = afina("data", "split", "--help", AFINA_LANG="es").stdout
        for phrase in ("Argumentos", "Opciones", "[obligatorio]"):
            assert phrase in shown, shown
        assert "Verbos" in afina("--help", LANG="es_ES.UTF-8").stdout
        refused = afina("traim", LANG="es_ES.UTF-8")
        assert refused.returncode == 2 and "No hay ningún verbo 'traim'." in refused.stderr
        assert "Arguments" in afina("train", "--help", LANG="es_ES.UTF-8", AFINA_LANG="en").stdout

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("train", "Falta el argumento 'recipe'."),
            ("data translate", "Falta el argumento 'source'."),
            ("train --wings", "No hay ninguna opción --wings."),
            ("chat x --temperatur 1", "No hay ninguna opción --temperatur. ¿Querías decir --temperature?"),
            ("-x", "No hay ninguna opción -x."),
            ("train --out", "La opción --out lleva 1 valor(es) detrás."),
            ("data translate x --prices 1", "La opción --prices lleva 2 valor(es) detrás."),
            ("train --json=3 x", "La opción --json no lleva ningún valor."),
            ("chat x y z", "No se espera nada después de los argumentos, pero hay: y z"),
            ("chat x --temperature hot", "Valor no válido para '--temperature': hot no es un número."),
            ("chat x --top-p 3", "Valor no válido para '--top-p': 3 es más que 1."),
            ("rate x --port -1", "Valor no válido para '--port': -1 es menos que 0."),
            ("rate x --port 8080.5", "Valor no válido para '--port': 8080.5 no es un número entero."),
            ("data translate x --to es --prices 1 b", "Valor no válido para '--prices': b no es un número."),
            ("chat x --effort much", "Valor no válido para '--effort': 'much' no es ninguno de estos: 'low', 'medium'"),
            ("export x --to docx", "Valor no válido para --to: 'docx' no es ninguno de estos: merged"),
            ("push x y/z --what docx", "Valor no válido para --what: 'docx' no es ninguno de estos: adapter"),
            ("--debug", "Falta el verbo."),
            ("data fly", "No hay ningún verbo 'fly'."),
        ],
    )
    def test_each_refusal_of_a_command_line(self, line, said, monkeypatch, capsys):
        """As the process has them, which takes half a second each, so here without one; for machines the same."""
        from afina.cli import main
        from afina.console import console

        monkeypatch.setenv("AFINA_LANG", "es")
        monkeypatch.setenv("LANGUAGE", "es")  # as language.lend has it
        monkeypatch.setattr(console, "debug", False)
        for machine in (False, True):
            monkeypatch.setattr(console, "json", machine)
            assert main._status([*["--json"] * machine, *line.split()]) == 2
            out, err = capsys.readouterr()
            shown = json.loads(out)["message"] if machine else err
            assert said in shown, shown
            assert "--help" in (json.loads(out)["hint"] if machine else err)

    @pytest.mark.parametrize("verb", ["", "data split "])
    def test_no_help_is_half_english(self, verb):
        shown = afina(*verb.split(), "-h", LANG="es_ES.UTF-8").stdout
        assert f"Uso: afina {verb}[OPCIONES]" in shown and "Muestra esta ayuda." in shown
        assert not {"Usage", "OPTIONS", "COMMAND", "Show"} & set(re.findall(r"\w+", shown))

    def test_what_is_lent_is_what_typer_asks_for(self):
        """Else the catalogue holds what nobody says any more."""
        from typer import core, rich_utils

        asked = {
            node.args[0].value
            for module in (core, rich_utils)
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_" and node.args
        }
        assert set(phrases()) <= asked


class TestProcess:
    def test_nohup_stays_in_force(self):
        """A run that was started to outlive its terminal does."""
        code = (
            "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
            "from afina.cli.main import _prepare_process; _prepare_process()\n"
            "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM).__name__)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "_on_signal"]

    def test_a_choice_of_how_threads_wait_is_respected(self):
        code = "import os; from afina.cli.main import _prepare_process as p; p(); print(os.environ['OMP_WAIT_POLICY'])"
        for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
            kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **given})
            assert done.stdout.strip() == expected

    def test_a_mistake_of_ours_asks_for_a_report(self):
        code = (
            "import sys; sys.argv = ['afina', 'init', 'x']\n"
            "from afina import pipeline\n"
            "def fail(*_arguments): raise ZeroDivisionError('oh [bold] no')\n"
            "pipeline.init = fail\n"
            "from afina.cli.main import main; main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert done.returncode == 1
        assert "ZeroDivisionError: oh [bold] no" in done.stderr and "--debug" in done.stderr
        assert is_calm(done)

    def test_a_refusal_of_the_system_names_the_file(self):
        code = (
            "import sys; sys.argv = ['afina', 'init', 'x']\n"
            "from afina import pipeline\n"
            "def fail(*_arguments): open('/nowhere/at/all')\n"
            "pipeline.init = fail\n"
            "from afina.cli.main import main; main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert done.returncode == 1
        assert done.stderr == "Error /nowhere/at/all: No such file or directory.\n"


@pytest.mark.slow
class TestInterrupted:
    def training(self, out: Path) -> subprocess.Popen:
        """A real training of the bundled model, stopped at a moment when it has taken some steps."""
        process = subprocess.Popen(
            [sys.executable, "-m", "afina", "--json", "train", str(SENTIMENT), "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        steps = 0
        for line in process.stdout:
            event = json.loads(line)
            assert event["event"] != "error", event
            steps += event["event"] == "progress"
            if steps == 3:
                return process
        raise AssertionError(process.stderr.read())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
    def test_it_says_that_it_goes_on_and_how(self, tmp_path, number):
        out = tmp_path / "runs" / "stopped"
        process = self.training(out)
        assert not (out / "manifest.json").exists()
        process.send_signal(number)
        said, complaint = process.communicate(timeout=120)
        assert process.returncode == 128 + number
        assert complaint == ""
        last = json.loads(said.splitlines()[-1])
        assert last["event"] == "error" and last["exit_status"] == 128 + number
        assert "is saved" in last["message"] and "same command again" in last["hint"]
        assert {path.name for path in out.iterdir()} == {"checkpoints", "metrics.jsonl", "state.json"}

    def test_what_kill_9_leaves_the_next_run_goes_on_with(self, tmp_path):
        out = tmp_path / "runs" / "stopped"
        process = self.training(out)
        process.kill()
        process.communicate(timeout=60)
        assert (out / "state.json").exists() and not (out / "manifest.json").exists()
        process = self.training(out)
        process.send_signal(signal.SIGINT)
        said, _complaint = process.communicate(timeout=120)
        assert process.returncode == 130 and "is saved" in json.loads(said.splitlines()[-1])["message"]
        assert [path for path in out.rglob("*") if ".partial" in path.name] == []
