"""Nothing half-written is ever visible: killed processes, full disks, refusals, and who may be swept away."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afina import durable
from afina.errors import DataError, OutputError


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def child(code: str, *arguments: object, **options) -> subprocess.Popen:
    """A real process that runs `code`, and says `ready` when it has come to the middle."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestWriting:
    def test_bytes_text_and_json_arrive(self, tmp_path):
        durable.write_bytes(tmp_path / "a" / "b" / "file", b"\0\xff")
        assert (tmp_path / "a" / "b" / "file").read_bytes() == b"\0\xff"
        durable.write_text(tmp_path / "text", "ñ\r\n")
        assert (tmp_path / "text").read_bytes() == "ñ\r\n".encode()
        durable.write_json(tmp_path / "json", {"b": "ñ", "a": 1})
        assert (tmp_path / "json").read_text("utf-8") == '{\n  "b": "ñ",\n  "a": 1\n}\n'
        assert (tmp_path / "json").stat().st_mode & 0o777 == 0o644

    def test_the_old_content_stays_when_the_new_cannot_be_told(self, tmp_path):
        durable.write_json(tmp_path / "json", 1)
        for hopeless in (float("nan"), object(), "\ud800"):
            with pytest.raises((ValueError, TypeError)):
                durable.write_json(tmp_path / "json", hopeless)
        assert entries(tmp_path) == ["json"]
        assert (tmp_path / "json").read_text() == "1\n"

    def test_a_reader_sees_the_old_or_the_new_and_never_a_part(self, tmp_path):
        """One process overwrites a file of 1 MB with other letters; this one reads it meanwhile."""
        code = (
            "import sys, itertools; from pathlib import Path; from afina import durable\n"
            "for letter in itertools.cycle('abcdef'):\n"
            "    durable.write_bytes(Path(sys.argv[1]), letter.encode() * 2**20)\n"
        )
        target = tmp_path / "file"
        writer, seen, until = child(code, target), set(), time.monotonic() + 20
        try:
            while len(seen) < 4 and time.monotonic() < until:
                if target.exists():
                    content = target.read_bytes()
                    assert len(content) == 2**20 and content == content[:1] * 2**20
                    seen.add(content[:1])
        finally:
            writer.kill()
            writer.communicate()
        assert len(seen) >= 4
        content = target.read_bytes()
        assert content == content[:1] * 2**20
        durable.sweep(tmp_path)
        assert entries(tmp_path) == ["file"]

    def test_a_folder_in_the_way_is_an_output_error(self, tmp_path):
        (tmp_path / "taken").mkdir()
        with pytest.raises(OutputError, match="taken"):
            durable.write_text(tmp_path / "taken", "x")
        assert entries(tmp_path) == ["taken"]

    def test_a_file_where_a_folder_is_due(self, tmp_path):
        (tmp_path / "file").write_text("x")
        for write in (
            lambda: durable.write_text(tmp_path / "file" / "below", "x"),
            lambda: durable.new_folder(tmp_path / "file" / "below").__enter__(),
            lambda: durable.new_file(tmp_path / "file" / "below").__enter__(),
            lambda: durable.Log(tmp_path / "file" / "below"),
        ):
            with pytest.raises(OutputError, match="below") as caught:
                write()
            assert "--out" in caught.value.hint

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
    def test_a_refusal_names_the_place_and_the_reason(self, tmp_path, monkeypatch, number):
        """The tests may run as root, whom nothing is refused: here the system call says no."""

        def refuse(*_arguments, **_options):
            raise OSError(number, os.strerror(number), str(tmp_path))

        monkeypatch.setattr(durable.tempfile, "mkstemp", refuse)
        with pytest.raises(OutputError, match=os.strerror(number)) as caught:
            durable.write_text(tmp_path / "x", "x")
        assert "permissions" in caught.value.hint

    def test_a_name_too_long_is_explained(self, tmp_path):
        with pytest.raises(OutputError, match="File name too long"):
            durable.write_text(tmp_path / ("x" * 250), "x")


class TestFullDisk:
    def test_a_limit_of_the_process(self, tmp_path):
        """RLIMIT_FSIZE is the full disk that needs no root: writing beyond it fails with EFBIG in the middle."""
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from afina import durable; from afina.errors import OutputError\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
            "for write in (lambda: durable.write_bytes(Path(sys.argv[1]) / 'a', b'x' * 10**6),\n"
            "              lambda: folder(Path(sys.argv[1]) / 'b')):\n"
            "    def folder(path):\n"
            "        with durable.new_folder(path) as new: (new / 'big').write_bytes(b'x' * 10**6)\n"
            "    try: write()\n"
            "    except OutputError as error: print(error.message)\n"
        )
        process = child(code, tmp_path)
        said, complaint = process.communicate(timeout=60)
        assert process.returncode == 0, complaint
        assert said.count("File too large") == 2
        assert entries(tmp_path) == []

    def test_a_log_ends_in_a_whole_line(self, tmp_path):
        """The disk fills in the middle of a line: the line is taken back, and those before it stay."""
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from afina import durable; from afina.errors import OutputError\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "log = durable.Log(Path(sys.argv[1]))\n"
            "try:\n"
            "    for step in range(1000): log.append({'step': step, 'text': 'x' * 90})\n"
            "except OutputError: print('stopped')\n"
        )
        process = child(code, tmp_path / "log.jsonl")
        said, complaint = process.communicate(timeout=60)
        assert said == "stopped\n", complaint
        lines = (tmp_path / "log.jsonl").read_bytes()
        assert lines.endswith(b"\n")
        assert [json.loads(line)["step"] for line in lines.splitlines()] == list(range(len(lines.splitlines())))
        assert len(lines.splitlines()) >= 7

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
    def test_a_disk_that_is_full(self, tmp_path):
        """A real one, of 256 KiB in memory."""
        small = tmp_path / "small"
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            durable.write_text(small / "kept", "old")
            with pytest.raises(OutputError, match="disk is full") as caught:
                durable.write_bytes(small / "kept", b"x" * 2**20)
            assert "--out" in caught.value.hint
            with pytest.raises(OutputError, match="disk is full"), durable.new_folder(small / "run") as new:
                (new / "big").write_bytes(b"x" * 2**20)
            with pytest.raises(OutputError, match="disk is full"), durable.new_file(small / "big") as new:
                new.write_bytes(b"x" * 2**20)
            assert entries(small) == ["kept"]
            assert (small / "kept").read_text() == "old"
            assert durable.free_bytes(small / "not" / "yet") > 200_000
        finally:
            subprocess.run(["umount", small], check=True)

    def test_a_library_that_tells_it_in_words(self, tmp_path):
        """safetensors raises its own error, whose text alone speaks of the disk."""

        class SafetensorError(Exception):
            pass

        with pytest.raises(OutputError, match="disk is full"), durable.new_folder(tmp_path / "run"):
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
        with pytest.raises(SafetensorError), durable.new_folder(tmp_path / "run"):
            raise SafetensorError("something else")
        assert entries(tmp_path) == []


class TestNewFolder:
    def test_it_appears_when_all_is_done(self, tmp_path):
        with durable.new_folder(tmp_path / "a" / "run") as new:
            (new / "deep").mkdir()
            (new / "deep" / "x").write_text("1")
            assert not (tmp_path / "a" / "run").exists()
            assert new.parent == tmp_path / "a" and new.name.startswith(".run.partial-")
        assert entries(tmp_path / "a") == ["run"]
        assert (tmp_path / "a" / "run" / "deep" / "x").read_text() == "1"
        assert (tmp_path / "a" / "run").stat().st_mode & 0o777 == 0o755

    @pytest.mark.parametrize("problem", [ValueError("x"), KeyboardInterrupt(), DataError("bad row"), SystemExit(3)])
    def test_it_vanishes_when_not(self, tmp_path, problem):
        with pytest.raises(type(problem)) as caught, durable.new_folder(tmp_path / "run") as new:
            (new / "x").write_text("1")
            raise problem
        assert caught.value is problem
        assert entries(tmp_path) == []

    @pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
    def test_what_exists_is_never_touched(self, tmp_path, kind):
        place = tmp_path / "run"
        if kind == "folder":
            place.mkdir()
        elif kind == "file":
            place.write_text("mine")
        else:
            place.symlink_to(tmp_path / "nowhere")
        for new in (durable.new_folder, durable.new_file):
            with pytest.raises(OutputError, match="exists already"), new(place):
                pytest.fail("the block must not run")
        assert entries(tmp_path) == ["run"]

    def test_of_two_at_once_one_wins_and_the_other_says_so(self, tmp_path):
        with pytest.raises(OutputError, match="exists already"), durable.new_folder(tmp_path / "run") as slow:
            (slow / "x").write_text("slow")
            with durable.new_folder(tmp_path / "run") as fast:
                (fast / "x").write_text("fast")
        assert entries(tmp_path) == ["run"]
        assert (tmp_path / "run" / "x").read_text() == "fast"

    def test_a_file_elsewhere_that_cannot_be_read_is_not_blamed_on_the_output(self, tmp_path):
        refusal = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/data.jsonl")
        with pytest.raises(PermissionError) as caught, durable.new_folder(tmp_path / "runs" / "run"):
            raise refusal
        assert caught.value is refusal

    def test_a_missing_file_is_not_blamed_on_the_output(self, tmp_path):
        with pytest.raises(FileNotFoundError), durable.new_folder(tmp_path / "run"):
            (tmp_path / "nowhere").read_text()


class TestNewFile:
    def test_it_appears_when_all_is_done(self, tmp_path):
        with durable.new_file(tmp_path / "model.gguf") as new:
            new.write_bytes(b"x" * 1000)
            assert not (tmp_path / "model.gguf").exists()
        assert entries(tmp_path) == ["model.gguf"]

    def test_it_vanishes_when_not(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), durable.new_file(tmp_path / "model.gguf") as new:
            new.write_bytes(b"x")
            raise KeyboardInterrupt
        assert entries(tmp_path) == []


class TestLog:
    @pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', b'{"a": 1}\n' + b"x" * 200_000 + b"\n"])
    @pytest.mark.parametrize("torn", [b"", b'{"b', b"y" * 200_000])
    def test_half_a_line_takes_no_other_along(self, tmp_path, whole, torn):
        (tmp_path / "log.jsonl").write_bytes(whole + torn)
        with durable.Log(tmp_path / "log.jsonl") as log:
            log.append({"c": 3})
        assert (tmp_path / "log.jsonl").read_bytes() == whole + b'{"c": 3}\n'

    def test_lines_are_there_at_once(self, tmp_path):
        with durable.Log(tmp_path / "a" / "log.jsonl") as log:
            log.append({"step": 1, "text": "ñ\n"})
            assert (tmp_path / "a" / "log.jsonl").read_text("utf-8") == '{"step": 1, "text": "ñ\\n"}\n'
            log.append({"step": 2})
        with durable.Log(tmp_path / "a" / "log.jsonl") as log:
            log.append({"step": 3})
        lines = (tmp_path / "a" / "log.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


class TestKilled:
    CODE = (
        "import sys, time; from pathlib import Path; from afina import durable\n"
        "place = Path(sys.argv[1])\n"
        "with durable.new_folder(place / 'run') as new, durable.new_file(place / 'file') as file:\n"
        "    (new / 'weights').write_bytes(b'x' * 10**6); file.write_bytes(b'half')\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )

    def killed(self, folder: Path, number: int) -> subprocess.Popen:
        process = child(self.CODE, folder)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate(timeout=30)
        return process

    def test_nothing_appears_under_the_final_name(self, tmp_path):
        process = self.killed(tmp_path, signal.SIGKILL)
        assert all(name.startswith((".run.partial-", ".file.partial-")) for name in entries(tmp_path))
        assert len(durable.sweep(tmp_path)) == 2
        assert entries(tmp_path) == []
        assert process.returncode == -signal.SIGKILL

    def test_what_can_be_caught_leaves_nothing_at_all(self, tmp_path):
        self.killed(tmp_path, signal.SIGINT)
        assert entries(tmp_path) == []

    def test_the_living_are_left_alone(self, tmp_path):
        process = child(self.CODE, tmp_path)
        assert process.stdout.readline() == "ready\n"
        try:
            assert durable.sweep(tmp_path) == []
            assert len(entries(tmp_path)) == 2
        finally:
            process.kill()
            process.communicate()


class TestSweep:
    def partial(self, folder: Path, process: object, machine: str | None = None) -> Path:
        path = folder / f".run{durable.PARTIAL}-{machine or durable._machine()}-{process}-abc"
        path.mkdir()
        (path / "x").write_text("x")
        return path

    def test_only_what_the_dead_left(self, tmp_path):
        left = self.partial(tmp_path, dead_process())
        mine = self.partial(tmp_path, os.getpid())
        (tmp_path / "run").mkdir()
        (tmp_path / f"my{durable.PARTIAL}-notes").write_text("a user's own file")
        assert durable.sweep(tmp_path) == [left]
        assert entries(tmp_path) == sorted([mine.name, "run", f"my{durable.PARTIAL}-notes"])

    def test_another_machine_is_never_judged(self, tmp_path):
        """On a shared disk the process of another machine may live under any number."""
        theirs = self.partial(tmp_path, dead_process(), machine="0123abcd")
        assert durable.sweep(tmp_path) == []
        assert theirs.exists()

    def test_a_number_that_was_given_again_protects_nothing(self, tmp_path):
        """In a container each run may have the same process id: who began after the last change did not write it."""
        left = self.partial(tmp_path, os.getpid())
        os.utime(left, (0, 0))
        assert durable.sweep(tmp_path) == [left]

    @pytest.mark.parametrize("name", ["-1", "", "x", "12x"])
    def test_names_of_another_making_stay(self, tmp_path, name):
        strange = self.partial(tmp_path, name)
        assert durable.sweep(tmp_path) == []
        assert strange.exists()

    def test_a_folder_that_is_not_there(self, tmp_path):
        assert durable.sweep(tmp_path / "nowhere") == []

    def test_the_machine_is_named_without_naming_it(self):
        assert len(durable._machine()) == 8
        assert platform.node() not in durable._machine()


def test_what_an_interrupted_process_left_is_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), durable.taken_up(out, "this") as place:
        (place / "half").write_text("half")
        raise KeyboardInterrupt
    assert not out.exists()
    with durable.taken_up(out, "this") as place:
        assert (place / "half").read_text() == "half"
        with pytest.raises(OutputError, match="in the hands of"), durable.taken_up(out, "this"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "half"]
    with pytest.raises(OutputError, match="exists already"), durable.taken_up(out, "this"):
        pass


def test_what_was_left_of_something_else_is_thrown_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), durable.taken_up(out, "this") as place:
        (place / "half").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError), durable.taken_up(out, "that") as place:
        assert not list(place.iterdir())
        raise ValueError
    assert not list(tmp_path.iterdir())
