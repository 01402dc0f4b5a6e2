"""P1, P5 and P6 in this process: a stopped run ends as the one nobody stopped, whatever went wrong on the way."""

import hashlib

import pytest
import torch
from train.sitting import SAMPLES, Killed, sit

from afina.data.order import Order
from afina.errors import Interrupted, ResourceError
from afina.model.load import Hardware
from afina.recipe.schema import Training
from afina.train import keeper as keepers
from afina.train import loop as loops
from afina.train import session as sessions
from afina.train.watch import Diverged


def trouble(step, batch, loss):
    """Out of memory at step 2 until it is cut smaller, no number at step 3 and 9."""
    if step == 2 and batch.input_ids.numel() > 40:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return loss * float("nan") if step in (3, 9) else loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sit(tmp_path_factory.mktemp("whole"), fault=trouble)


def test_what_happened_is_written(whole):
    kinds = [line["kind"] for line in whole["lines"]]
    assert kinds.count("memory") >= 1 and kinds.count("rejected") == 2 and kinds.count("step") == 10
    assert {entry["step"] for entry in whole["room"]["history"]} == {3} and whole["room"]["tokens"] < 80
    assert [entry["step"] for entry in whole["watch"]["rejected"]] == [4, 10]


@pytest.mark.parametrize("at", range(1, 12))
def test_a_run_killed_anywhere_ends_the_same(tmp_path, whole, at):
    with pytest.raises(Killed):
        sit(tmp_path, fault=trouble, kill_at=at, save_after=range(0, at, 2))
    assert sit(tmp_path, fault=trouble) == whole


def test_out_of_memory_changes_no_sample_and_hardly_a_bit(tmp_path, whole):
    smooth = sit(tmp_path, fault=lambda step, batch, loss: loss * float("nan") if step in (3, 9) else loss)
    assert smooth["tally"]["ledger"] == whole["tally"]["ledger"]
    losses = [[line["loss"] for line in run["lines"] if line["kind"] == "step"] for run in (smooth, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # dropout's seeds go by the micro-step
    assert losses[0][:2] == losses[1][:2]


MUTANTS = {
    "weights": lambda state, session: [p.data.zero_() for p in state.learning.values()],
    "first moment": lambda state, session: [m["exp_avg"].zero_() for m in state.optimizer.state.values()],
    "second moment": lambda state, session: [m["exp_avg_sq"].zero_() for m in state.optimizer.state.values()],
    "moments' step": lambda state, session: [m["step"].zero_() for m in state.optimizer.state.values()],
    "step": lambda state, session: setattr(state, "step", 0),
    "validated": lambda state, session: setattr(state, "validated", 0),
    "windows": lambda state, session: [window.clear() for window in state.watch.windows],
    "ceilings": lambda state, session: setattr(state.watch, "ceilings", [-9e9, -9e9]),
    "accepted": lambda state, session: setattr(state.watch, "accepted", 0),
    "rejected": lambda state, session: state.watch.known.clear(),
    "room": lambda state, session: setattr(session.room, "tokens", 80),
    "room's history": lambda state, session: session.room.history.clear(),
    "first loss": lambda state, session: setattr(session.tally, "first_loss", None),
    "tokens": lambda state, session: setattr(session.tally, "tokens", 0),
    "learnt": lambda state, session: setattr(session.tally, "learnt", 0),
    "validation": lambda state, session: session.tally.validation.clear(),
    "ledger": lambda state, session: setattr(session.tally, "ledger", ""),
    "training losses": lambda state, session: session.tally.trained.clear(),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_each_part_of_the_state_is_needed(tmp_path, whole, monkeypatch, mutant):
    with pytest.raises(Killed):
        sit(tmp_path, fault=trouble, kill_at=10, save_after=(0, 8))
    good = sessions.Session._restore

    def forgetful(self, state, checkpoint):
        good(self, state, checkpoint)
        if mutant:
            MUTANTS[mutant](state, self)

    monkeypatch.setattr(sessions.Session, "_restore", forgetful)
    assert (sit(tmp_path, fault=trouble) == whole) == (mutant is None)


DERIVED = {
    "dropout's seeds": (loops, "derived_seed", lambda real: lambda seed, what, step, m: real(seed, what, step - 8, m)),
    "order": (Order, "step", lambda real: lambda self, step: real(self, step - 8)),
    "schedule": (loops, "learning_rate", lambda real: lambda training, step, steps: real(training, step - 8, steps)),
}
"""What no checkpoint holds, as it follows from the number of the step; the mutants count from where they went on."""


@pytest.mark.parametrize("mutant", [None, *DERIVED])
def test_what_follows_from_the_step_is_counted_from_the_beginning(tmp_path, monkeypatch, mutant):
    training = Training(learning_rate=1e-2, warmup=3, schedule="cosine", checkpoint_minutes=1e-9)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = sit(tmp_path / "whole", training=training)
    with pytest.raises(Killed):
        sit(tmp_path / "killed", training=training, kill_at=10, save_after=(0, 8))
    if mutant:
        home, name, forgetful = DERIVED[mutant]
        monkeypatch.setattr(home, name, forgetful(getattr(home, name)))
    assert (sit(tmp_path / "killed", training=training) == whole) == (mutant is None)


def test_the_log_is_cut_back(tmp_path, whole, monkeypatch):
    with pytest.raises(Killed):
        sit(tmp_path, fault=trouble, kill_at=10)
    monkeypatch.setattr(sessions.Record, "cut", lambda self, mark: True)
    assert sit(tmp_path, fault=trouble) != whole


def test_the_scale_of_fp16_is_kept(tmp_path, monkeypatch):
    half = Hardware(torch.device("cpu"), torch.float16)
    folders = [tmp_path / name for name in ("whole", "killed", "mutant")]
    for folder in folders:
        folder.mkdir()
    whole = sit(folders[0], hardware=half)
    for folder in folders[1:]:
        with pytest.raises(Killed):
            sit(folder, hardware=half, kill_at=9)
    assert sit(folders[1], hardware=half) == whole and whole["finite"] and whole["scaler"]
    good = sessions.Session._restore

    def forgetful(self, state, checkpoint):
        good(self, state, checkpoint)
        state.scaler.load_state_dict({**state.scaler.state_dict(), "_growth_tracker": 0, "scale": 2.0})

    monkeypatch.setattr(sessions.Session, "_restore", forgetful)
    assert sit(folders[2], hardware=half) != whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_gives_no_number_changes_nothing(tmp_path, place, value):
    def spoil(step, batch, loss):
        if step != 5:
            return loss
        if place == "loss":
            return loss * value
        loss.register_hook(lambda gradient: gradient * value)
        return loss

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    said: list[str] = []
    before = sit(tmp_path / "a", steps=5)
    after = sit(tmp_path / "b", steps=6, fault=spoil, said=said)
    assert after["tensors"] == before["tensors"]
    assert any("Step 6 was not taken" in line and "Its samples" in line for line in said)


def _leaf(loss):
    """Some weight that learns, found from the loss."""
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            return node.variable
        waiting += [following for following, _place in node.next_functions if following is not None]
    raise AssertionError


def test_a_broken_weight_is_mended_from_the_last_good_checkpoint(tmp_path):
    """A flipped bit, say. Three rejections, back to step 5, and the samples of those three are left out."""
    broken = []

    def flip(step, batch, loss):
        if step == 7 and not broken:
            broken.append(step)
            with torch.no_grad():
                _leaf(loss).data.fill_(float("nan"))
            return loss * float("nan")
        return loss

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    said: list[str] = []
    mended = sit(tmp_path / "a", fault=flip, said=said)
    assert mended["finite"] and any("back to step 5" in line for line in said)
    skipped = sit(tmp_path / "b", fault=lambda step, batch, loss: loss * float("nan") if step in (7, 9) else loss)
    assert [entry["step"] for entry in mended["watch"]["rejected"]] == [8, 9, 10] and skipped["finite"]
    steps = [line["step"] for line in mended["lines"] if line["kind"] in ("step", "rejected")]
    assert steps == list(range(1, 13))


def test_when_going_back_does_not_help_the_run_ends(tmp_path):
    with pytest.raises(Diverged, match="in a row"):
        sit(tmp_path, steps=20, fault=lambda step, batch, loss: loss * float("nan") if step > 6 else loss)


def test_a_single_sample_that_does_not_fit_ends_the_run(tmp_path):
    def never(step, batch, loss):
        raise RuntimeError("MPS backend out of memory")

    with pytest.raises(ResourceError, match="single sample"):
        sit(tmp_path, fault=never)


def test_another_error_is_not_taken_for_memory(tmp_path):
    def wrong(step, batch, loss):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        sit(tmp_path, fault=wrong)


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_that_is_not_exact_says_so_when_it_goes_on(tmp_path, exact):
    with pytest.raises(Killed):
        sit(tmp_path, kill_at=9)
    said: list[str] = []
    sit(tmp_path, said=said, exact=exact)
    assert any("training.exact is false" in line for line in said) != exact


def test_what_differs_where_it_goes_on_is_said(tmp_path):
    with pytest.raises(Killed):
        sit(tmp_path, kill_at=9, surroundings={"torch": "2.11.0", "threads": "2", "host": "here"})
    said: list[str] = []
    sit(tmp_path, said=said, surroundings={"torch": "2.13.0", "threads": "2", "host": "there"})
    (line,) = said
    assert "torch 2.11.0 → 2.13.0. Training goes on" in line and "last bits" in line


def test_the_ledger_is_known_beforehand(whole):
    """Anybody who has the recipe can count it up: the order alone says which samples each step that was taken had."""
    order, ledger = Order(len(SAMPLES), 4, 100.0, 7), ""
    for step in (line["step"] for line in whole["lines"] if line["kind"] == "step"):
        samples = sorted(int(sample) for sample in order.step(step - 1))
        ledger = hashlib.sha256(f"{ledger} {step} {samples}".encode()).hexdigest()
    assert whole["tally"]["ledger"] == ledger


def test_a_signal_in_the_middle_of_a_step_is_raised_there_and_loses_no_step(tmp_path):
    import os
    import signal

    def hit(step, batch, loss):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(Interrupted) as caught:
        sit(tmp_path, fault=hit)
    assert caught.value.exit_status == 143


def test_out_of_memory_while_validating_is_survived(tmp_path):
    """The samples of the validation are cut smaller, and the run ends as it would have: only its log knows."""

    def greedy(step, batches):
        if any(batch.input_ids.numel() > 40 for batch in batches):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for name in "ab":
        (tmp_path / name).mkdir()
    smooth, found = sit(tmp_path / "a"), sit(tmp_path / "b", fault_in_validation=greedy)
    assert found["room"]["tokens"] <= 40 and {entry["step"] for entry in found["room"]["history"]} == {8}
    assert found["tally"]["ledger"] == smooth["tally"]["ledger"]
    assert found["tally"]["validation"] == smooth["tally"]["validation"] and found["finite"]


@pytest.mark.parametrize("phase", ["backward", "clip", "copy"])
def test_out_of_memory_in_any_phase_changes_no_sample(tmp_path, monkeypatch, phase):
    for name in "ab":
        (tmp_path / name).mkdir()
    smooth, struck = sit(tmp_path / "a"), []

    def once(real):
        def failing(*given, **more):
            if not struck:
                struck.append(phase)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*given, **more)

        return failing

    def spoil(step, batch, loss):
        if step == 5 and batch.input_ids.numel() > 40:
            struck.append(phase)
            loss.register_hook(once_in_backward)
        return loss

    def once_in_backward(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    if phase == "clip":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", once(torch.nn.utils.clip_grad_norm_))
    if phase == "copy":
        monkeypatch.setattr(keepers, "Snapshot", once(keepers.Snapshot))
    found = sit(tmp_path / "b", fault=spoil if phase == "backward" else None, said=said)
    assert struck and found["tally"]["ledger"] == smooth["tally"]["ledger"]
    if phase != "backward":
        assert found["tensors"] == smooth["tensors"]
    if phase == "copy":
        assert any("copy of the weights" in line and "goes on" in line for line in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_out_of_memory_in_the_optimiser_undoes_half_a_step(tmp_path, dtype):
    """Some weights have learnt from the step and others not: back to the checkpoint, and on from there to the same end.

    Where the memory runs out again at the same step, the run ends, and goes on from what is on the disk.
    """
    half, struck = Hardware(torch.device("cpu"), dtype), []

    def short(often):
        def prepare(model, state):
            real = state.optimizer.step

            def step(*given, **more):
                if state.step != 7 or len(struck) >= often:
                    return real(*given, **more)
                struck.append(state.step)
                with torch.no_grad():
                    next(iter(state.learning.values())).add_(1.0)
                raise torch.OutOfMemoryError("CUDA out of memory")

            state.optimizer.step = step

        return prepare

    for name in "abc":
        (tmp_path / name).mkdir()
    said: list[str] = []
    smooth = sit(tmp_path / "a", hardware=half)
    assert sit(tmp_path / "b", hardware=half, prepare=short(1), said=said) == smooth and struck == [7]
    assert any("step 8" in line and "back to step 5" in line for line in said)
    with pytest.raises(ResourceError, match="optimiser needs for step 8"):
        sit(tmp_path / "c", hardware=half, prepare=short(9))
    assert len(struck) == 3 and sit(tmp_path / "c", hardware=half) == smooth


@pytest.mark.parametrize("place", ["weight", "input"])
def test_what_is_no_number_in_weight_or_input_is_seen_at_the_step(tmp_path, place):
    """A weight of the base, or what is looked up of the embedding, is no number while step 6 is computed."""

    def spoil(model, state):
        embedding = model.get_input_embeddings()
        base = next(value for name, value in model.named_parameters() if "down_proj.base_layer.weight" in name)
        sound = base.detach().clone()

        def weight(*_given):
            base.data.copy_(sound * (float("nan") if state.step == 5 else 1.0))

        def looked_up(_module, _given, output):
            return output * float("inf") if state.step == 5 else output

        if place == "weight":
            embedding.register_forward_pre_hook(weight)
        else:
            embedding.register_forward_hook(looked_up)

    for name in "abc":
        (tmp_path / name).mkdir()
    said: list[str] = []
    before = sit(tmp_path / "a", steps=5)
    after = sit(tmp_path / "b", steps=6, prepare=spoil, said=said)
    assert after["tensors"] == before["tensors"] and any("Step 6 was not taken" in line for line in said)
    on = sit(tmp_path / "c", steps=9, prepare=spoil)
    assert on["finite"] and on["tensors"] != before["tensors"] and len(on["watch"]["rejected"]) == 1


def test_a_run_that_ended_early_stays_ended(tmp_path, monkeypatch):
    """Killed between its last step and its end; and the mutant that forgets that it had ended."""
    measured = {2: 1.0, 4: 1.2, 6: 1.5, 8: 1.6}
    for name in ("whole", "killed", "mutant"):
        (tmp_path / name).mkdir()
    whole = sit(tmp_path / "whole", measured=measured)
    last = whole["tally"]["findings"][-1]
    assert last["ended"] and whole["kept"]["step"] == last["step"] < 12

    def killed(self, state):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sessions.Session, "finish", killed)
        for name in ("killed", "mutant"):
            with pytest.raises(Killed):
                sit(tmp_path / name, measured=measured, save_after=(0, last["step"]))
    assert sit(tmp_path / "killed", measured=measured) == whole
    real = sessions.Session._restore

    def forgetful(self, state, checkpoint):
        real(self, state, checkpoint)
        state.last = None

    monkeypatch.setattr(sessions.Session, "_restore", forgetful)
    assert sit(tmp_path / "mutant", measured=measured) != whole
