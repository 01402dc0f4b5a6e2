"""Programs run where they can only compute: what loops, forks, writes, connects or eats memory is stopped and named."""

import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afina.data.conversation import Message, Sample
from afina.errors import DataError
from afina.evaluate.code_process import seccomp_filter
from afina.evaluate.measure import KINDS
from afina.evaluate.systems.asking import Answer
from afina.evaluate.tasks.code import Sandbox, pass_at, program_of
from afina.recipe.schema import Task

FORGED = '{"outcome": "passed", "reason": "", "enforced": true, "seal": ""}'
"""What a program might say in the sandbox's place."""
WRITTEN = f"""\
import os
for reply in range(3, 64):
    try: os.write(reply, {FORGED.encode()!r})
    except OSError: pass
os._exit(0)
"""
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(3.0) as found:
        yield found


@pytest.mark.parametrize(
    "program, outcome",
    [
        ("assert 1 + 1 == 2", "passed"),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", "passed"),
        ("import math, re, collections, random, json, datetime, decimal, itertools", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        (WRITTEN, "failed"),
        (f"import json; json.dumps = lambda said: {FORGED!r}; assert 1 + 1 == 3", "failed"),
        (f"import json; json.JSONEncoder.encode = lambda *_: {FORGED!r}; assert 1 + 1 == 3", "failed"),
        ("import os; os._exit = os.write = print; assert 1 + 1 == 3", "failed"),
        ("raise ValueError('\\ud800\\n\\0' * 1000)", "failed"),
        ("def f(:", "no code"),
        ("def f(n): return f(n + 1)\nf(0)", "failed"),
        ("x = 'a' * 10**11", "memory"),
        ("import os; os.fork()", "forbidden"),
        ("import subprocess; subprocess.run(['true'])", "forbidden"),
        ("import os; os.system('true')", "forbidden"),
        ("import socket; socket.socket()", "forbidden"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "forbidden"),
        ("open('/tmp/afina-was-here', 'w')", "forbidden"),
        ("import os; os.remove('/tmp/afina-was-here')", "forbidden"),
        ("import shutil; shutil.rmtree('/tmp/afina-nothing')", "forbidden"),
        ("open('/etc/passwd').read()", "forbidden"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "forbidden"),
        ("import ctypes; ctypes.CDLL(None).fork()", "forbidden"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "forbidden"),
    ],
)
def test_a_program_can_only_compute(sandbox, program, outcome):
    found = sandbox.run(program)
    assert found["outcome"] == outcome, found
    assert not Path("/tmp/afina-was-here").exists()
    assert sandbox.run("pass")["outcome"] == "passed"  # and the next one runs as ever


def test_a_program_that_loops_is_ended():
    with Sandbox(0.3) as sandbox:
        for program in (
            "while True: pass",
            "import time; time.sleep(60)",
            "while True:\n    try: 1 / 0\n    except: pass",
        ):
            began = time.perf_counter()
            assert sandbox.run(program)["outcome"] == "timeout"
            assert time.perf_counter() - began < 20


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
@pytest.mark.parametrize(
    "call",
    [
        "open(b'/tmp/afina-was-here', 0o101, 0o600)",
        "socket(2, 1, 0)",
        "fork()",
        "kill(1, 0)",
        "unlink(b'/tmp/afina-was-here')",
        "mkdir(b'/tmp/afina-was-here', 0o700)",
        "execv(b'/bin/true', None)",
        "rename(b'/tmp/a', b'/tmp/b')",
    ],
)
def test_the_kernel_refuses_what_python_was_tricked_into(tmp_path, call):
    """Without the audit hook: the same through the C library, in a child whose doors are closed."""
    from afina.evaluate import code_process

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        closed = code_process.close_doors()
        result = eval(f"library.{call}", {"library": library})  # noqa: S307 - the calls above
        os.write(write, json.dumps([closed, result, ctypes.get_errno()]).encode())
        os._exit(0)
    os.close(write)
    content = os.read(read, 1000)
    os.close(read)
    os.waitpid(child, 0)
    assert json.loads(content) == [True, -1, 1]  # EPERM


def test_filters_of_both_architectures_jump_inside_themselves():
    import struct

    for machine in ("x86_64", "aarch64"):
        code = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
        assert len(code) < 4096
        for place, (kind, yes, no, _value) in enumerate(code):
            assert place + 1 + max(yes, no) < len(code) or kind == 0x06
        assert code[-1] == (0x06, 0, 0, 0x7FFF0000)


@given(st.integers(1, 30), st.data())
def test_pass_at_k_is_the_share_of_choices_with_one_that_passes(attempts, data):
    passed, k = data.draw(st.integers(0, attempts)), data.draw(st.integers(1, attempts))
    failing = math.comb(attempts - passed, k) / math.comb(attempts, k)
    assert pass_at(k, attempts, passed) == pytest.approx(1 - failing)


def test_a_program_is_found_in_prose_and_completed():
    stub = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n'
    whole = "def add(a, b):\n    return a + b"
    for answer in (whole, f"Sure!\n```python\n{whole}\n```\nDone.", "    return a + b", "return a + b"):
        names: dict = {}
        exec(program_of(stub, answer), names)  # noqa: S102 - programs written above
        assert names["add"](2, 3) == 5
    assert program_of("Write a function.", f"```\n{whole}") == whole


def marks(pairs, **changes):
    """Marks of (prompt, tests, answers)."""
    task = Task(name="t", kind="code", data="-", attempts=len(pairs[0][2]), **changes)
    samples = [Sample((Message("user", ask), Message("assistant", tests)), Path("t"), 1) for ask, tests, _a in pairs]
    kind = KINDS["code"]
    asked = kind.prepare(task, samples, Path())
    found = kind.mark(asked, range(len(pairs)), [[Answer(one) for one in answers] for *_rest, answers in pairs])
    return found, kind.figures(asked, range(len(pairs)), found)


def test_attempts_are_counted():
    good, bad = "def f(): return 1", "def f(): return 2"
    found, figures = marks([("f", "assert f() == 1", [bad, good, good, bad]), ("f", "assert f() == 1", [""] * 4)])
    assert [mark.problem for mark in found] == ["failed", "empty"]
    assert figures["pass@1"] == pytest.approx(0.25) and figures["pass@4"] == 0.5
    with pytest.raises(DataError, match="should be Python"):
        marks([("f", "assert f( == 1", [good])])


def mutated(code: str) -> str:
    """A solution that is wrong: every returned value is replaced."""
    return re.sub(r"^(\s+)return\b.*", r"\1return object()", code, flags=re.MULTILINE)


@pytest.mark.real
def test_humaneval_references_pass_and_mutated_ones_fail(real_data):
    rows = [json.loads(line) for line in (real_data / "data/code/humaneval-python.jsonl").open(encoding="utf-8")]
    assert len(rows) == 164
    right, _figures = marks([(row["prompt"], row["test"], [row["canonical_solution"]]) for row in rows])
    assert sum(bool(mark.right) for mark in right) == 164
    wrong, _figures = marks([(row["prompt"], row["test"], [mutated(row["canonical_solution"])]) for row in rows])
    assert sum(bool(mark.right) for mark in wrong) == 0


@pytest.mark.real
@pytest.mark.slow
def test_mbpp_references_pass(real_data):
    """All 974. Those of 367 and 927 fail where their setup, which needs the program's classes, stands before it."""
    rows = [json.loads(line) for line in (real_data / "data/code/mbpp.jsonl").open(encoding="utf-8")]
    cases = [(row["text"], "\n".join([row["test_setup_code"], *row["test_list"]]), [row["code"]]) for row in rows]
    found, _figures = marks(cases, seconds=20.0)
    failed = {row["task_id"] for row, mark in zip(rows, found, strict=True) if not mark.right}
    assert failed == set() and len(rows) == 974
