"""The ways in which exports go wrong, each with the check that must catch it; and the table of them in docs/export.md.

PYTHONPATH=src:tests python -m export.faults    writes the table anew; a test compares it
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from afina.export import families, folding, gguf
from afina.export import merge as merge_room

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN, END = "<!-- faults: written by tests/export/faults.py -->\n", "<!-- end of faults -->"
Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, the check that catches it, and a part of what is said then. `inject` is called before an export
    of the run in the given folder; where it is None a test of its own stages the fault."""

    what: str
    caught_by: str
    says: str
    inject: Callable[[Patch, Path], None] | None = None


def change_plans(monkeypatch: Patch, change: Callable[[gguf.Plan], gguf.Plan]) -> None:
    plan = gguf._plan_tensors
    monkeypatch.setattr(gguf, "_plan_tensors", lambda *given: [change(one) for one in plan(*given)])


def change_vocabulary(monkeypatch: Patch, change: Callable[[Any], Any]) -> None:
    read = gguf.read_vocabulary
    monkeypatch.setattr(gguf, "read_vocabulary", lambda folder: change(read(folder)))


def change_adapter(monkeypatch: Patch, change: Callable[[folding.Adapter], None]) -> None:
    read = merge_room.read_adapter

    def changed(folder: Path) -> Any:
        adapter = read(folder)
        assert adapter is not None
        change(adapter)
        return adapter

    monkeypatch.setattr(merge_room, "read_adapter", changed)


def wrong_template(monkeypatch: Patch, _run: Path) -> None:
    change_vocabulary(
        monkeypatch, lambda v: dataclasses.replace(v, chat_template=v.chat_template.replace("assistant", "bot"))
    )


def wrong_eos(monkeypatch: Patch, _run: Path) -> None:
    change_vocabulary(monkeypatch, lambda v: dataclasses.replace(v, eos=v.tokens.index("a")))


def double_bos(monkeypatch: Patch, _run: Path) -> None:
    def change(vocabulary: Any) -> Any:
        template = "<|endoftext|>" + vocabulary.chat_template
        return dataclasses.replace(vocabulary, bos=0, add_bos=True, chat_template=template)

    change_vocabulary(monkeypatch, change)


def dropped_module(monkeypatch: Patch, _run: Path) -> None:
    def forget(adapter: folding.Adapter) -> None:
        name = next(name for name in adapter.pairs if "1.mlp.down_proj" in name)
        adapter.pairs[name] = dataclasses.replace(adapter.pairs[name], scale=0.0)

    change_adapter(monkeypatch, forget)


def wrong_scale(monkeypatch: Patch, _run: Path) -> None:
    def double(adapter: folding.Adapter) -> None:
        for name, pair in adapter.pairs.items():
            adapter.pairs[name] = dataclasses.replace(pair, scale=2 * pair.scale)

    change_adapter(monkeypatch, double)


def unused_tensor(monkeypatch: Patch, _run: Path) -> None:
    expected = merge_room.expected_changes
    monkeypatch.setattr(merge_room, "expected_changes", lambda model: expected(model)[:-1])


def saved_base(monkeypatch: Patch, run: Path) -> None:
    """In memory all is well; on the disk lies the base."""

    def wrong(_base: Path, adapter: folding.Adapter, out: Path, *_rest: Any) -> dict[str, Any]:
        AutoModelForCausalLM.from_pretrained(run.parent / "base").save_pretrained(out)
        return {"used": adapter.tensors}

    monkeypatch.setattr(merge_room, "fold", wrong)
    monkeypatch.setattr(merge_room, "apart", lambda *_given: (0.0, 0.0))  # the first check to see it


def gate_is_up(monkeypatch: Patch, _run: Path) -> None:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def change(plan: gguf.Plan) -> gguf.Plan:
        other = next((plan.source.replace(name, swap[name]) for name in swap if name in plan.source), plan.source)
        return dataclasses.replace(plan, source=other)

    change_plans(monkeypatch, change)


def wrong_rope(monkeypatch: Patch, _run: Path) -> None:
    read = gguf.read_shape
    monkeypatch.setattr(gguf, "read_shape", lambda folder: dataclasses.replace(read(folder), theta=500.0))


def unpermuted(monkeypatch: Patch, _run: Path) -> None:
    monkeypatch.setitem(families.FAMILIES, "LlamaForCausalLM", dataclasses.replace(families.LLAMA, interleaved=()))


def tied_head(base: Path) -> None:
    """The head learnt on its own, but the file says it is the embeddings: llama.cpp then takes these."""
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))


FAULTS = [
    Fault("wrong chat template in the file", "the prompt", "would see another prompt", wrong_template),
    Fault("beginning-of-sequence written by the template and added again", "the prompt", "prompt", double_bos),
    Fault("an ordinary token as end of sequence", "the ends", "would stop in the middle of an answer", wrong_eos),
    Fault("the end of turn not named in the file", "the ends", "would not stop where the model's answer ends"),
    Fault("a LoRA module left out of the merge", "the merge", "away from base and adapter", dropped_module),
    Fault("the adapter added at twice its scale", "the merge", "away from base and adapter", wrong_scale),
    Fault("an adapter tensor that nothing used", "the merge", "tensors that the merge did not use", unused_tensor),
    Fault("the base saved instead of the merged model", "the merge", "lacks the training of", saved_base),
    Fault("gate and up projections swapped", "the predictions", "is not the model", gate_is_up),
    Fault("another RoPE base", "the predictions", "is not the model", wrong_rope),
    Fault("query and key rows not permuted", "the predictions", "is not the model", unpermuted),
    Fault("a head of its own left out, embeddings in its place", "the predictions", "is not the model"),
]
BY_NAME = {fault.what: fault for fault in FAULTS}


def table() -> str:
    rows = [f"| {fault.what} | {fault.caught_by} | … {fault.says} … |" for fault in FAULTS]
    return "\n".join(["| fault | caught by | what is said |", "|---|---|---|", *rows, ""])


def main() -> None:
    text = DOCS.read_text("utf-8")
    DOCS.write_text(re.sub(f"(?s){BEGIN}.*{END}", f"{BEGIN}{table()}{END}", text), "utf-8")


if __name__ == "__main__":
    main()
