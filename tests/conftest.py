"""What many tests need: the real inputs where there are any, and small models built in code."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("AFINA_LANG", "en")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist runs one process a core

import torch

if not torch.cuda.is_available():  # the engine's kernels run in Triton's interpreter, which must know before its import
    os.environ["TRITON_INTERPRET"] = "1"

for name in ("SIGINT", "SIGHUP"):  # ignored under nohup or `&`, and so in every process that tests start
    if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else lambda _number, _frame: None)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real inputs; the test is skipped, saying so, where there is none."""
    folder = Path(os.environ.get("AFINA_REAL_DATA", ROOT.parent / "shared")).resolve()
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip(f"no real inputs in {folder}: set AFINA_REAL_DATA")
    return folder
