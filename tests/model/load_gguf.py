"""What real llama.cpp says of each GGUF file in a folder, none of them looked at by us before.

PYTHONPATH=src:tests python -m model.load_gguf FOLDER

Each is loaded in a process of its own, forked after the imports, for llama.cpp ends the process on some files. Prints
one JSON object: name to "loads", "refused" or "ends the process".
"""

import json
import os
import sys
from pathlib import Path

import xllamacpp  # noqa: F401 (before the forks)

from afina.errors import ModelError
from afina.model import llamacpp


def verdict(path: Path) -> str:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        try:
            server = llamacpp._start(path, "key", 64, 1, 1, 0, "f16")
            os._exit(0 if server.listening_address else 70)
        except ModelError:
            os._exit(3)
        finally:
            os._exit(70)
    _pid, status = os.waitpid(child, 0)
    return {0: "loads", 3: "refused"}.get(os.waitstatus_to_exitcode(status), "ends the process")


if __name__ == "__main__":
    print(json.dumps({path.name: verdict(path) for path in sorted(Path(sys.argv[1]).iterdir())}))
