"""Real text under permissive licences, read from the folder the tests use; where a file is absent, it is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

from opinions import turns


def gsm8k(data: Path) -> list[str]:
    """Grade-school problems (MIT), without the calculator marks; half as chats."""
    texts = []
    for i, line in enumerate((data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "Answer:")
        texts.append(turns(row["question"], answer) if i % 2 else f"{row['question']}\n{answer}")
    return texts


def mbpp(data: Path) -> list[str]:
    """Short Python programs (CC BY 4.0), less the two whose references fail."""
    texts = []
    for i, line in enumerate((data / "code/mbpp.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        if row["task_id"] in (367, 927):
            continue
        code = row["code"].replace("\r\n", "\n").replace("\t", "    ").strip()
        texts.append(turns(row["text"], code) if i % 2 else f"# {row['text']}\n{code}")
    return texts


def gpteacher(data: Path) -> list[str]:
    """Role play (MIT), as chats."""
    rows = json.loads((data / "gpteacher/roleplay.json").read_text(encoding="utf-8"))
    return [turns("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]


def snips(data: Path) -> list[str]:
    """Spoken requests (CC0), plain sentences without their marks, twenty to a document."""
    sentences = []
    for path in sorted((data / "snips").glob("*/train_*_full.json")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        for rows in json.loads(text).values():
            sentences += ["".join(piece["text"] for piece in row["data"]).strip() for row in rows]
    sentences = sorted(set(sentences))
    return ["\n".join(sentences[i::700]) for i in range(700)]


def quijote(data: Path) -> list[str]:
    """Cervantes (public domain), in passages of some 1,200 characters; Spanish of 1605, so little of it is used."""
    text = (data / "es/quijote.txt").read_text(encoding="utf-8").replace("\r\n", "\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n|\n(?=[A-ZÁÉÍÓÚÑ—-])", text)]
    passages, current = [], ""
    for paragraph in filter(None, paragraphs):
        current += paragraph + "\n"
        if len(current) > 1200:
            passages.append(current.strip())
            current = ""
    return passages


READERS = {"gsm8k": gsm8k, "mbpp": mbpp, "gpteacher": gpteacher, "snips": snips, "quijote": quijote}


def read(name: str, folder: Path) -> list[str]:
    """The documents of one real source under `folder`/data, or none where it is missing."""
    try:
        return READERS[name](folder / "data")
    except FileNotFoundError:
        return []
