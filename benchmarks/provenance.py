"""Where a figure comes from: the commit that was measured. Of the standard library alone, for all that measures."""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def commit() -> str:
    """What a file beside the tree says, where it was copied; else of the working tree."""
    file = HERE.parent / "commit"
    if file.is_file():
        return file.read_text("utf-8").strip()
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=HERE, check=False).stdout.strip()
