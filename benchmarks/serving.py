"""A server asked 32 things: one after another, and all at once. Also how long a newcomer waits for its first word.

    python benchmarks/serving.py >> benchmarks/results/serve.jsonl

The bundled base on the CPU, a process of its own; questions of the bundled general set, 96 tokens of answer each (its
end forbidden), streamed to threads of OpenAI's client. Tokens a second by the clock, and by the processor time that the
server's process took; seconds to the first token. The better of two rounds in turns.
"""

import datetime
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from openai import OpenAI
from provenance import commit

from afina.artifact import versions
from afina.data.load_tokenizer import load_tokenizer
from afina.recipe.place import BUNDLED

TINY = str(BUNDLED / "tiny")
COUNT, TOKENS = 32, 96


def ask(client: OpenAI, question: str, ends: dict[str, int]) -> tuple[float, int]:
    """Seconds to the first token, and how many came."""
    began, first, count = time.perf_counter(), 0.0, 0
    given: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0}
    stream = client.chat.completions.create(
        **given, max_tokens=TOKENS, logit_bias=ends, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        first = first or time.perf_counter() - began
        count = chunk.usage.completion_tokens if chunk.usage else count
    return first, count


def measured(client: OpenAI, process: psutil.Process, threads: int, questions: list[str]) -> dict[str, float]:
    ends = {str(index): -100 for index in load_tokenizer(TINY).end_ids}
    before, began = process.cpu_times(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda question: ask(client, question, ends), questions))
    seconds, after = time.perf_counter() - began, process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    firsts, tokens = sorted(first for first, _count in found), sum(count for _first, count in found)
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_processor_s": round(tokens / spent, 1),
        "first_token_s_median": round(statistics.median(firsts), 3),
        "first_token_s_worst": round(firsts[-1], 3),
    }


def newcomer(client: OpenAI, questions: list[str]) -> float:
    """Seconds to the first token of one that comes while eight long answers are written."""
    ends = {str(index): -100 for index in load_tokenizer(TINY).end_ids}
    long: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 400, "logit_bias": ends, "stream": True}
    streams = [
        client.chat.completions.create(messages=[{"role": "user", "content": text}], **long) for text in questions[:8]
    ]
    first = ask(client, questions[8], ends)[0]
    for stream in streams:
        stream.close()
    return round(first, 3)


def main() -> None:
    rows = (BUNDLED / "general" / "questions.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(row)["question"] for row in rows]
    questions = (questions * COUNT)[:COUNT]
    command = [sys.executable, "-m", "afina", "serve", TINY, "--json", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            serving = json.loads(server.stdout.readline())
            client, process = OpenAI(base_url=serving["url"], api_key="none", timeout=600), psutil.Process(server.pid)
            measured(client, process, 4, questions[:4])  # what is made once
            rounds = [
                (measured(client, process, 1, questions), measured(client, process, COUNT, questions)) for _ in range(2)
            ]
            waits = newcomer(client, questions)
        finally:
            server.terminate()
            server.stdout.read()
    one, all_of_them = (max(each, key=lambda found: found["tokens_per_s"]) for each in zip(*rounds, strict=True))
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": "python benchmarks/serving.py",
        "requests": COUNT,
        "tokens_each": TOKENS,
        "one_by_one": one,
        "at_once": all_of_them,
        "newcomer_beside_eight_first_token_s": waits,
        "versions": versions(),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
