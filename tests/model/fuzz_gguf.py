"""Give the GGUF reader mutated files: each is read, or refused by a ModelError; nothing else may come of it.

PYTHONPATH=src:tests python -m model.fuzz_gguf COUNT [SEED]

Half of COUNT in each of two processes, in memory. Prints one JSON object; exits with 1 when another exception came out,
and says which file brought it.
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from model.gguf_bytes import Mutator

from afina.errors import ModelError
from afina.gguf_file import Strings, read_head


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """Read `count` files; whoever is accepted must hold what it says, down to its last text."""
    mutator = Mutator(seed)
    accepted = 0
    slowest = 0.0
    started = time.perf_counter()
    for number in range(count):
        content = mutator.draw()
        before = time.perf_counter()
        try:
            head = read_head(content)
            accepted += 1
            for tensor in head.tensors.values():
                if tensor.start + tensor.bytes > len(content):
                    raise AssertionError(f"{tensor} lies outside")
            for value in head.metadata.values():
                if isinstance(value, Strings):
                    list(value)
        except ModelError:
            pass
        except BaseException as error:
            raise AssertionError(f"file {number} of seed {seed}: {error!r} from {content.hex()}") from error
        slowest = max(slowest, time.perf_counter() - before)
    seconds = time.perf_counter() - started
    return {"files": count, "accepted": accepted, "seconds": round(seconds, 2), "slowest_ms": round(1000 * slowest, 2)}


def main(count: int, seed: int) -> None:
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(fuzz, [count - count // 2, count // 2], [seed, seed + 1]))
    print(
        json.dumps(
            {key: max(part[key] for part in found) for key in ("seconds", "slowest_ms")}
            | {key: sum(part[key] for part in found) for key in ("files", "accepted")}
            | {"seed": seed}
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
