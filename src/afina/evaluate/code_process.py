"""The warden: runs programs that a model wrote, each in a child of its own that can do nothing but compute.

JSON lines in, JSON lines out; run by worker.py in an isolated interpreter, never imported by the house. It is the only
file that executes foreign text. The warden itself never does: it forks, and the child gives up every right before it
begins:

* a clock that ends it, a ceiling on memory and processor time, no core dump;
* seccomp (Linux on x86-64 and arm64): no socket, no new process, no signal to others, no file opened for writing,
  made, changed or removed, no limit raised; a system call of another architecture ends it;
* an audit hook that refuses the same in Python's words, also where there is no seccomp, and notes that it was tried.

A program passes when it runs to its end: to exit early, whatever the status, is to fail. Asserts are its tests.
"""

import ctypes
import json
import os
import platform
import resource
import secrets
import select
import signal
import struct
import sys
import time
from typing import Any

DENIED = {
    "x86_64": (
        *(41, 42, 43, 44, 46, 49, 50, 53, 288, 307),  # sockets
        *(57, 58, 59, 322, 62, 101, 200, 234, 272, 308, 310, 311, 424, 434),  # processes, signals, namespaces
        *(76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 188, 189, 190, 197, 198, 199, 235),
        *(258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 285, 316, 437, 452),  # the same, by folder
        *(155, 161, 164, 165, 166, 167, 168, 169, 170, 171, 175, 176, 227, 304, 313),  # the machine
        *(29, 64, 68, 160, 248, 250, 298, 302, 319, 321, 323, 425, 428, 429, 432, 442),  # the rest
    ),
    "aarch64": (
        *(198, 199, 200, 201, 202, 203, 206, 211, 242, 269),
        *(221, 281, 129, 130, 131, 117, 97, 268, 270, 271, 424, 434),
        *(5, 6, 7, 14, 15, 16, 33, 34, 35, 36, 37, 38, 45, 46, 47, 52, 53, 54, 55, 88, 276, 437, 452),
        *(39, 40, 41, 51, 105, 106, 112, 142, 161, 162, 170, 224, 225, 265, 273),
        *(186, 190, 194, 164, 217, 219, 241, 261, 279, 280, 282, 425, 428, 429, 432, 442),
    ),
}
"""System calls that fail with EPERM."""
OPENING = {"x86_64": ((2, 24), (257, 32)), "aarch64": ((56, 32),)}
"""Calls that open a file, and where their flags stand in seccomp's data."""
CLONING = {"x86_64": (56, 435), "aarch64": (220, 435)}
"""clone, which threads need, and clone3, whose flags seccomp cannot see."""
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
THREAD = 0x00010000
ALLOW, REFUSE, NOT_THERE, END = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
OUTPUT_BYTES = 4096
FORBIDDEN = (
    *("socket.", "http.", "urllib.Request", "ftplib.", "smtplib.", "webbrowser.", "sqlite3.connect"),
    *("subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.startfile", "pty."),
    *("os.kill", "signal.pthread_kill", "resource.set", "ctypes."),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.truncate", "os.putenv", "shutil."),
)
"""Beginnings of the audit events of what a program may not do."""


def seccomp_filter(machine: str) -> bytes:
    """The program that the kernel runs before every system call, as an array of struct sock_filter."""
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((0x20, 0, 0, offset))

    def answer(value: int) -> None:
        code.append((0x06, 0, 0, value))

    load(4)
    code.append((0x15, 1, 0, ARCHITECTURE[machine]))
    answer(END)
    load(0)
    if machine == "x86_64":  # the x32 calls, which are numbered apart
        code.append((0x35, 0, 1, 0x40000000))
        answer(REFUSE)
    for number in DENIED[machine]:
        code.append((0x15, 0, 1, number))
        answer(REFUSE)
    for number, flags in OPENING[machine]:
        code.append((0x15, 0, 4, number))
        load(flags)
        code.append((0x45, 0, 1, WRITING))
        answer(REFUSE)
        answer(ALLOW)
    clone, clone3 = CLONING[machine]
    code.append((0x15, 0, 1, clone3))
    answer(NOT_THERE)  # the C library then takes clone
    code.append((0x15, 0, 4, clone))
    load(16)
    code.append((0x45, 1, 0, THREAD))
    answer(REFUSE)
    answer(ALLOW)
    answer(ALLOW)
    return b"".join(struct.pack("<HBBI", *one) for one in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def close_doors() -> bool:
    """Give up every right; returns whether the kernel enforces it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in DENIED:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    content = seccomp_filter(machine)
    held = ctypes.create_string_buffer(content, len(content))
    program = _Program(len(content) // 8, ctypes.cast(held, ctypes.c_void_p))
    no_new_rights, set_seccomp, mode_filter = 38, 22, 2
    if library.prctl(no_new_rights, 1, 0, 0, 0) != 0:
        return False
    return bool(library.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0) == 0)


def watch(tried: list[str]) -> None:
    """Refuse in Python what seccomp refuses in the kernel, and note that it was tried."""
    readable = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, *(path for path in sys.path if path), "/usr/share"})

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            written = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITING
            seen = isinstance(path, str | bytes) and os.fsdecode(path).startswith((*readable, "/dev/null", "<"))
            if written or not (seen or isinstance(path, int)):
                tried.append("open")
                raise PermissionError("a program under test may not open this file")
        elif event.startswith(FORBIDDEN):
            tried.append(event)
            raise PermissionError(f"a program under test may not do this: {event}")

    sys.addaudithook(hook)


def run(program: str, seconds: float, memory: int, reply: int, seal: str) -> None:
    """In the child: never returns. `seal` shows that it is we who reply: the program can write to `reply` too.

    It can also turn what it shares with us into something else, so what replies is at hand before it begins. Whoever
    searches the frames for the seal would find it: this is against chance and bad habits, not against a burglar.
    """
    write, leave = os.write, os._exit
    tried: list[str] = []
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    whole = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    enforced = close_doors()
    watch(tried)
    outcome, reason = "failed", ""
    try:
        code = compile(program, "program.py", "exec")
        exec(code, {"__name__": "__main__"})  # noqa: S102 - what this file is for
        outcome = "passed"
    except MemoryError:
        outcome = "memory"
    except SyntaxError as error:
        outcome, reason = "no code", str(error)
    except BaseException as error:  # noqa: BLE001 - whatever a program ends with
        reason = f"{type(error).__name__}: {error}"
    if outcome == "failed" and tried:
        outcome, reason = "forbidden", tried[0]
    said = "\n".join((seal, outcome, "enforced" if enforced else "", reason[:500]))
    write(reply, said.encode("utf-8", "replace")[:OUTPUT_BYTES])
    leave(0)


def judge(program: str, seconds: float, memory: int) -> dict[str, Any]:
    """Run one program in a child; what became of it."""
    seal = secrets.token_hex(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            run(program, seconds, memory, write, seal)
        finally:
            os._exit(1)
    os.close(write)
    until, content = time.monotonic() + seconds, b""
    while True:
        ready, _write, _error = select.select([read], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            found: dict[str, Any] = {"outcome": "timeout", "reason": ""}
            break
        piece = os.read(read, OUTPUT_BYTES)
        content += piece
        if not piece:
            found = _parsed(content, seal)
            break
    os.close(read)
    os.kill(child, signal.SIGKILL)
    _child, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        found = {"outcome": "timeout", "reason": ""}
    return found


def _parsed(content: bytes, seal: str) -> dict[str, Any]:
    """What the child said; a child that ended before its program did said nothing, which is to fail, and so does what
    the program itself said in our place."""
    sealed, *said = content.decode("utf-8", "replace").split("\n", 3)
    if sealed == seal and len(said) == 3:
        return {"outcome": said[0], "enforced": bool(said[1]), "reason": said[2]}
    return {"outcome": "failed", "reason": "it ended before its tests did"}


def main() -> None:
    """Answer until the input ends."""
    import collections  # noqa: F401 - children start with these

    for line in sys.stdin:
        asked = json.loads(line)
        found = judge(asked["program"], float(asked["seconds"]), int(asked["memory"]))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
