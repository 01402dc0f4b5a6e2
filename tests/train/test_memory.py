"""P5 and P3 in the small: the probe leaves no trace; a log waits for room on the disk."""

import errno
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CPU, llama
from train.test_loop import rows

from afina import durable
from afina.data.batch import micro_batches
from afina.data.order import order_of
from afina.data.template import Rendered
from afina.errors import OutputError, ResourceError
from afina.model.attach import attach
from afina.model.loss import summed_loss
from afina.recipe.schema import Lora, Training
from afina.train.loop import accumulate
from afina.train.memory import Room, fullest, probe
from afina.train.record import Record


def test_the_probe_tries_the_largest_and_changes_no_weight_and_no_random_number():
    model, samples, room, tried = attach(llama(), Lora(dropout=0.5), seed=0).train(), rows(8), Room(100), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def compute(batch):
        tried.append(batch.input_ids.numel())
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        accumulate(model, [batch], batch.targets.numel(), 0, 0, CPU, summed_loss)

    def make():
        return micro_batches(samples, range(8), budget=room.tokens, packing=True, pad_id=0)

    lines = probe(room, make, compute)
    assert lines == [{"kind": "memory", "step": 0, "before": 100, "after": room.tokens}]
    assert room.tokens == tried[0] // 2 and tried[1] <= room.tokens
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shrinking_ends_at_single_samples():
    room = Room(10_000)
    for _time in range(30):
        batches = micro_batches(rows(8), range(8), budget=room.tokens, packing=True, pad_id=0)
        if all(len(batch.samples) == 1 for batch in batches):
            break
        room.shrink(1, batches)
    with pytest.raises(ResourceError):
        room.shrink(1, batches)


def test_a_log_waits_for_room_and_loses_no_line(tmp_path, monkeypatch):
    record, real = Record(tmp_path), durable.Log.append
    assert record.add({"step": 1})

    def full(self, line):
        raise OutputError("full") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable.Log, "append", full)
    assert not record.add({"step": 2}) and not record.add({"step": 3})
    with pytest.raises(OutputError):
        record.mark()
    monkeypatch.setattr(durable.Log, "append", real)
    assert record.add({"step": 4})
    mark = record.mark()
    record.add({"step": 5})
    assert record.cut(mark)
    record.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_a_log_that_was_changed_is_told_and_ends_in_a_whole_line(tmp_path):
    record = Record(tmp_path)
    record.add({"step": 1})
    record.add({"step": 2})
    mark = record.mark()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    assert not record.cut(mark)
    record.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=8, max_size=60),
    batch=st.integers(2, 24),
    budget=st.integers(60, 400),
    epochs=st.integers(1, 3),
)
def test_what_is_tried_first_is_as_large_as_any_micro_batch_of_the_run(lengths, batch, budget, epochs):
    more = [None] * (len(Rendered.__dataclass_fields__) - 2)
    samples = [Rendered(np.zeros(length, np.int32), np.ones(length, bool), *more) for length in lengths]
    training = Training(batch_size=batch, epochs=epochs)
    order = order_of(lengths, training, 1)

    def largest(chosen):
        cut = micro_batches(samples, chosen, budget=budget, packing=True, pad_id=0)
        return max(part.input_ids.numel() for part in cut)

    tried = max(map(largest, fullest(samples, training, 1, budget)))
    every = max(largest(order.step(step)) for step in range(order.steps))
    assert tried >= every - max(lengths)
