"""The law of the house: its floors, doors, names and sizes. Each table is a decision; ARCHITECTURE.md draws it.

A ratchet (LONG_FILES, LONG_FUNCTIONS) may only shrink: what is listed has a reason, and its number is what it was when
it was last made smaller. A new library needs a row in DOORS, and the row is where the review starts.
"""

import ast
import os
import re
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "afina"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base", "manager"}

DOORS = {
    # The floor of all computing rooms. Not: the ground floor, recipe/, cli/, serve/terminal.py, pipeline.py.
    "torch": (
        "model/",
        "engine/",
        "train/",
        "data/batch.py",
        "evaluate/systems/",
        "export/",
        "compress/",
        "serve/speakers.py",
    ),
    "numpy": ("gguf_file.py", "data/", "engine/", "evaluate/", "export/", "model/"),
    "triton": ("engine/", "train/adamw_kernels.py"),
    # Models come in through load; generate, attention and tokenizer hold what only transformers can name.
    "transformers": (
        "model/load.py",
        "model/attention.py",
        "model/generate.py",
        "model/decode.py",
        "model/continuous.py",
        "model/fixed.py",
        "model/packed.py",
        "model/padded.py",
        "data/load_tokenizer.py",
        "model/translator.py",
    ),
    "tokenizers": ("data/tokenizer.py", "data/load_tokenizer.py", "data/patterns.py"),
    "peft": ("model/attach.py", "model/saved.py", "model/experts.py", "model/mixed.py"),
    "bitsandbytes": ("model/quantize.py",),
    "safetensors": ("export/gguf.py", "export/weights.py", "train/checkpoint.py"),
    "gguf": ("export/gguf.py", "export/gguf_head.py", "gguf_file.py"),
    "xllamacpp": ("model/llamacpp.py",),
    "zstandard": ("data/lines.py",),
    "pyarrow": ("data/parquet.py",),
    "huggingface_hub": ("data/hub.py", "model/hub.py", "export/push.py"),
    # The audit's fast parser, and the old encodings as programs really use them.
    "msgspec": ("data/audit/",),
    "ftfy": ("data/audit/mojibake.py",),
    "ruamel": ("recipe/document.py",),
    "pydantic": ("recipe/", "serve/openai.py"),
    # The server, an optional extra: routes, who is let in, and an answer as it goes out.
    "fastapi": ("serve/http.py", "serve/gate.py", "serve/answering.py"),
    "starlette": ("serve/http.py", "serve/gate.py"),
    "uvicorn": ("serve/http.py",),
    "pydantic_core": ("recipe/explain.py",),
    # Templates run sandboxed: chat templates and mappings in data, our own page in report.
    "jinja2": (
        "data/",
        "evaluate/report/page.py",
        "evaluate/ratings/page.py",
        "evaluate/tasks/lm_eval_tasks.py",
        "export/page.py",
    ),
    "markupsafe": ("export/page.py",),
    "matplotlib": ("evaluate/plot.py", "evaluate/spread.py"),
    "markdown_it": ("data/protect.py",),
    "rich": ("console.py",),
    # How answers are marked and constrained: the optional packages of the extra `eval`.
    "jsonschema": ("data/targets.py",),
    "referencing": ("data/targets.py",),
    "llguidance": ("model/grammar.py",),
    "math_verify": ("evaluate/maths_process.py",),
    "rouge_score": ("evaluate/tasks/similarity.py",),
    "sacrebleu": ("evaluate/tasks/similarity.py",),
    "lm_eval": ("evaluate/tasks/lm_eval_tasks.py",),
    "typer": ("cli/",),
    # Who is alive (sweep), and the process that runs llama.cpp.
    "psutil": ("durable.py", "model/llamacpp.py"),
}
"""Third-party library: where it may be imported (a file, or a room ending in /)."""
NARROW = {
    # What reaches outside this process, or into its memory.
    "socket": ("model/endpoint.py", "hub.py", "serve/http.py"),
    "ssl": ("model/endpoint.py",),
    "urllib": ("model/endpoint.py", "hub.py", "evaluate/ratings/page.py", "translation.py"),
    "http": ("model/llamacpp.py", "model/endpoint.py", "evaluate/ratings/page.py"),
    "ctypes": ("model/llamacpp.py", "evaluate/code_process.py", "train/stop.py"),
    "subprocess": ("evaluate/worker.py", "data/worker.py", "export/ollama.py", "apart.py"),
    "multiprocessing": (),
    # What runs code out of data.
    "pickle": (),
    "shelve": (),
    "marshal": (),
    "yaml": (),
}
"""The same for parts of the standard library that need a reason."""
ENVIRONMENT = {"language.py", "recipe/load.py", "cli/main.py", "model/endpoint.py", "hub.py"}
"""Read the environment: the language, variables of a recipe, how threads wait, an endpoint's key, where the hub is."""
EXECUTING = {"evaluate/code_process.py"}
"""Runs the programs that a model wrote, in children that can do nothing but compute."""
BROAD = {
    "evaluate/code_process.py": 1,  # what a program under test ends with
    "evaluate/maths_process.py": 1,  # what sympy raises on no mathematics
    "cli/main.py": 1,  # shows whatever is left as a mistake of ours
    "serve/gate.py": 1,  # in the server; told in a sentence, for nobody above would
    "serve/desk.py": 1,  # in a thread; told to whoever is being answered
    "beside.py": 1,  # in a thread; raised where the result is asked for
    "train/stop.py": 1,  # the same
    "durable.py": 5,  # takes away what is half-written, then raises on; a full disk told in words alone
    "recipe/starter.py": 1,  # the same, for a project folder
    "data/lines.py": 1,  # an optional package's own error, told by its name
    "data/tokenizer.py": 1,  # the Rust side of tokenizers panics with a BaseException
    "data/load_tokenizer.py": 1,  # tokenizers raises plain Exception for a tokenizer.json it cannot read
    "data/worker.py": 1,  # a signal in the middle of an answer ends the process, then is raised on
    "data/patterns.py": 2,  # the same, where it harms nobody
    "model/translator.py": 1,  # what transformers raises on a damaged folder is anything at all
    "export/push.py": 1,  # what the hub, its client and the network raise has no one parent
    "train/keeper.py": 1,  # in a thread, what is not caught is told to nobody
    "model/load.py": 1,  # what transformers raises on a damaged folder is anything at all
    "model/saved.py": 3,  # the same of PEFT; and safetensors hides a full disk in an exception of its own
}
"""`except Exception`, `except BaseException` and bare `except`, counted."""
PRINTING = {"console.py", "evaluate/code_process.py", "evaluate/maths_process.py"}
"""Write to stdout; the two processes answer there, in JSON lines."""

FILE_LINES = 400
LONG_FILES = {
    "export/gguf_vocab.py": 490,
    "recipe/explain.py": 450,
}
FUNCTION_LINES = 80
LONG_FUNCTIONS = {
    "train/run.py:_run_loop": 85,  # what the loop calls back, beside what it is given
}
PARAMETERS = 9
MANY_PARAMETERS = {
    "cli/data/translate.py:command": 13,  # options of a command line
    "cli/chat.py:command": 11,  # each option of the command line is one
    "cli/compress/prune.py:command": 10,  # the same
    "cli/rate.py:command": 10,  # the same
    "model/packed.py:_attend": 10,  # what transformers gives an attention
    "train/loop.py:train": 10,  # the loop: everything it touches is named at its door
}
HOSTS = {
    "arxiv.org",
    "creativecommons.org",
    "github.com",
    "huggingface.co",
    "json-schema.org",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
    "www.w3.org",
}
HELP_S = 0.5
"""What `afina --help` is to take on a quiet machine; printed, not asserted."""


def relative(path: Path) -> str:
    """How the tables above name a file."""
    return path.relative_to(PACKAGE).as_posix()


def each_file(function):
    return pytest.mark.parametrize("path", FILES, ids=relative)(function)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Top-level names of what is imported anywhere in the file, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            found.add((node.module or "").partition(".")[0])
    return found


def is_allowed(path: Path, doors: tuple[str, ...]) -> bool:
    name = relative(path)
    return any(name.startswith(door) if door.endswith("/") else name == door for door in doors)


def calls(path: Path) -> list[tuple[str, int]]:
    """Dotted name and line of every call."""
    return [
        (ast.unparse(node.func), node.lineno)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]


def tracked() -> list[Path]:
    """What goes into a release: what git knows, or every file where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts() -> list[Path]:
    """The tracked files that hold text."""
    files = [path for path in tracked() if path.suffix not in {".safetensors", ".mo", ".png", ".gguf"}]
    return files or pytest.skip("no git here")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_floors_hold():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@each_file
def test_each_library_has_its_doors(path: Path):
    for name in imports(path):
        if name in NARROW:
            assert is_allowed(path, NARROW[name]), f"{relative(path)} imports {name}: its doors are {NARROW[name]}"
        elif name != "afina" and name not in sys.stdlib_module_names:
            assert name in DOORS, f"{relative(path)} imports {name}, which has no door yet: decide on one in DOORS"
            assert is_allowed(path, DOORS[name]), f"{relative(path)} imports {name}: its doors are {DOORS[name]}"


def test_no_door_leads_nowhere():
    """A library that nothing imports loses its row."""
    used = {name for path in FILES for name in imports(path)}
    assert set(DOORS) <= used, f"nothing imports {set(DOORS) - used}"


def test_declared_dependencies_are_the_imported_ones():
    """What pyproject.toml asks for is imported, and what is imported is asked for."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [item for name in extras.keys() - {"dev"} for item in extras[name]]
    names = {
        re.split(r"[<>=\[; ]", item)[0].replace("-", "_").removesuffix(".yaml").removesuffix("_py") for item in asked
    }
    comes_along = {
        "pydantic_core",
        "markupsafe",
        "triton",
        "referencing",
        "starlette",
    }  # pydantic's, jinja2's, torch's, jsonschema's, fastapi's
    goes_along = {"sentencepiece"}  # transformers asks for it, to read some translation models' tokenizers
    assert names == set(DOORS) - comes_along | goes_along


@each_file
def test_says_what_it_is_for(path: Path):
    docstring = ast.get_docstring(tree(path))
    assert docstring, f"{relative(path)} has no docstring"
    assert len(docstring.splitlines()[0]) <= 120


@each_file
def test_is_named_for_what_it_holds(path: Path):
    parts = set(path.relative_to(PACKAGE).with_suffix("").parts)
    assert not parts & FORBIDDEN_NAMES, f"{relative(path)}: a name that says nothing"


@each_file
def test_does_nothing_forbidden(path: Path):
    for name, line in calls(path):
        where = f"{relative(path)}:{line}"
        if relative(path) not in EXECUTING:
            assert name not in {"eval", "exec", "compile", "__import__"}, f"{where} runs text as code"
        assert name not in {"torch.load", "torch.save", "np.load", "numpy.load"}, f"{where} reads or writes a pickle"
        assert name != "os.system", where
        if relative(path) not in PRINTING:
            assert name not in {"print", "sys.stdout.write", "sys.stderr.write"}, f"{where} prints; console.py does"
    for node in ast.walk(tree(path)):
        where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: an assert vanishes under -O; raise an error"
        assert not isinstance(node, ast.Global), f"{where}: global"
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}:
            assert relative(path) in ENVIRONMENT, f"{where} reads the environment"


def test_broad_handlers_are_counted():
    found: dict[str, int] = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            broad = {"Exception", "BaseException"}
            if isinstance(node, ast.ExceptHandler) and (node.type is None or getattr(node.type, "id", "") in broad):
                found[relative(path)] = found.get(relative(path), 0) + 1
    assert found == BROAD


def test_only_durable_writes():
    """Nothing else writes, renames or removes a file. What a library writes itself goes into a new folder."""
    writing = re.compile(
        r"\.(write_text|write_bytes|rename|unlink|rmdir|mkdir|touch)$|^(shutil\.\w+|os\.(open|rename|replace|remove))$"
    )
    allowed = {
        "durable.py",
        "cli/main.py",  # /dev/null, once nobody reads stdout
        "recipe/starter.py",  # makes the folders of a project
        "model/saved.py",  # takes away the card that PEFT writes, inside a new folder
        "export/run.py",  # takes away the merged model it needed on the way, inside a new folder
    }
    for path in FILES:
        for name, line in calls(path):
            if relative(path) not in allowed and not name.startswith("durable."):
                assert not writing.search(name), f"{relative(path)}:{line}: {name}: durable.py writes"


def test_sizes():
    files = {relative(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    functions: dict[str, int] = {}
    parameters: dict[str, int] = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{relative(path)}:{node.name}"
                functions[name] = max(functions.get(name, 0), (node.end_lineno or 0) - node.lineno + 1)
                arguments = node.args
                if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    continue  # a Triton kernel is given pointers, strides and sizes one by one
                parameters[name] = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
    for sizes, limit, exceptions in (
        (files, FILE_LINES, LONG_FILES),
        (functions, FUNCTION_LINES, LONG_FUNCTIONS),
        (parameters, PARAMETERS, MANY_PARAMETERS),
    ):
        over = {name: size for name, size in sizes.items() if size > exceptions.get(name, limit)}
        assert not over, f"split these, or give them a reason: {over}"
        idle = [name for name in exceptions if sizes.get(name, 0) < 0.9 * limit]
        assert not idle, f"no longer need an exception: {idle}"


def test_no_benchmarks_import_each_other_in_a_circle():
    """Some do so inside functions, for what is large; what all need has a file of its own."""
    files = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    asked = {
        name: set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE))
        & files.keys() - {name}
        for name, path in files.items()
    }
    assert "provenance" in asked["gpu"]
    TopologicalSorter(asked).prepare()  # raises CycleError, which names the circle


def test_the_loop_is_read_first():
    """DESIGN: about 160 lines, so that it is read in one sitting."""
    assert len((PACKAGE / "train" / "loop.py").read_text("utf-8").splitlines()) <= 175


def test_importing_afina_is_light():
    heavy = ("torch", "transformers", "pydantic", "numpy", "rich", "typer")
    loaded = run_python(f"import sys, afina; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_help_is_light():
    heavy = ("torch", "transformers", "peft", "numpy", "matplotlib", "jinja2", "gguf", "pydantic", "ruamel")
    code = (
        "import sys\n"
        "sys.argv = ['afina', '--help']\n"
        "from afina.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    started = time.perf_counter()
    shown = run_python(code)
    print(f"afina --help: {time.perf_counter() - started:.2f} s (to be under {HELP_S} s on a quiet machine)")
    for verb in ("run", "init", "train", "eval", "rate", "export", "chat", "serve"):
        assert verb in shown


def test_what_fails_at_once_loads_no_torch(tmp_path):
    """A run folder that exists, another recipe's, is told before the seconds that torch takes are spent."""
    (tmp_path / "recipe.yaml").write_text("name: x\nmodel: {base: afina/tiny}\ndata: {train: train.jsonl}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    code = f"""
import sys
from afina import pipeline
try: pipeline.train("{tmp_path / "recipe.yaml"}", "{tmp_path / "run"}")
except pipeline.OutputError: print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_training_loads_nothing_that_it_does_not_need(tmp_path):
    """What transformers loads where it is installed, for images and for decoding, costs seconds of each run's start."""
    (tmp_path / "recipe.yaml").write_text("name: x\nmodel: {base: afina/tiny}\ndata: {train: missing.jsonl}\n")
    code = f"""
import sys
from afina import pipeline
from afina.errors import AfinaError
try: pipeline.train("{tmp_path / "recipe.yaml"}", "{tmp_path / "run"}")
except AfinaError: pass
assert "afina.train.run" in sys.modules
print([name for name in ("scipy", "sklearn", "torchvision") if sys.modules.get(name)])
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_public_names_resolve():
    import afina

    import_module("afina.evaluate.plot")  # the room `evaluate` must not come to stand where the verb does
    import_module("afina.export.card")
    for name in afina.__all__:
        assert callable(getattr(afina, name)), name
        assert name in dir(afina)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = afina.nothing
    assert set(afina._HOMES) == set(afina.__all__)


@each_file
def test_all_names_what_there_is(path: Path):
    """Only `__init__.py` says `__all__`; wherever it is said, each name is there."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            module = import_module(".".join(part for part in parts if part != "__init__"))
            assert all(hasattr(module, name) for name in ast.literal_eval(node.value))


def test_every_recipe_loads(monkeypatch: pytest.MonkeyPatch):
    from afina.recipe.load import load

    monkeypatch.setenv("AFINA_REAL_DATA", "somewhere")
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 8, "recipes went missing"
    for path in recipes:
        first = path.read_text("utf-8").splitlines()[0]
        assert first.startswith("# afina ") and path.name in first, f"{path.name}: the first line is the exact command"
        assert load(path).name


def test_every_key_of_the_recipe_is_read():
    """An option that nothing reads is a lie: each field of the schema is an attribute somewhere in the source."""
    from afina.recipe import schema

    read = {node.attr for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    sections = [
        section
        for section in vars(schema).values()
        if isinstance(section, type) and issubclass(section, schema.Section) and section is not schema.Section
    ]
    assert len(sections) >= 6
    dead = {f"{section.__name__}.{key}" for section in sections for key in section.model_fields if key not in read}
    assert not dead


def test_nothing_of_the_makers_machine_is_tracked():
    """Neither this clone's place, nor the home folder, nor where pip gets packages from: a clone works anywhere."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    sources = re.findall(r"(?:index-url|find-links|cert|proxy)='([^']+)'", asked.stdout)
    places = [str(ROOT), str(Path.home()), *(word for value in sources for word in value.split())]
    told = [place.rstrip("/").encode() for place in places if len(place) > 4]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {place.decode()}"
        for path in texts()
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        for place in told
        if re.search(rb"(?<![\w.])" + re.escape(place) + rb"(?!\w)", line)
    ]
    assert not found


def test_only_known_hosts_are_named():
    """A URL is a name (a schema, a licence) or a place to read: each host is listed, none serves packages."""
    named = re.compile(r"https?://([^/\s\"'`<>()\[\]{},:]+)")
    found = {
        (path.relative_to(ROOT).as_posix(), host)
        for path in texts()
        for host in named.findall(path.read_text("utf-8", "replace"))
        if host not in HOSTS and "." in host and not host.replace(".", "").isdigit()
    }
    assert not found


def test_constraints_name_versions_and_no_places():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50 and "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in pins)
    names = [line.partition("==")[0] for line in pins]
    assert names == sorted(names)


def test_ci_runs_everything():
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for part in ("make lint", "make test", "make demo"):
        assert part in text
