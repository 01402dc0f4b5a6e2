"""math-verify in a process of its own: JSON lines in, JSON lines out. Run by worker.py, never imported.

Its own time limits need the main thread and signals; here there are none, for who waits ends this process.
"""

import json
import sys
from typing import Any


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for the same. The texts may be LaTeX with or without dollars."""
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        dressed = text if "$" in text or "\\boxed" in text else f"${text}$"
        return list(parse(dressed, parsing_timeout=None, raise_on_error=False))

    return bool(verify(read(gold), read(answer), timeout_seconds=None, raise_on_error=False))


def main() -> None:
    """Answer until the input ends."""
    reply = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found: dict[str, Any] = {"equal": equal(asked["gold"], asked["answer"])}
        except ImportError:
            found = {"missing": True}
        except Exception as error:  # noqa: BLE001 - sympy raises anything at all on what is no mathematics
            found = {"equal": False, "reason": type(error).__name__}
        reply.write(json.dumps(found) + "\n")
        reply.flush()


if __name__ == "__main__":
    main()
