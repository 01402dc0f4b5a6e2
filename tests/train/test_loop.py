import numpy as np
import pytest
import torch
from small import CPU, llama, perturb_adapters

from afina.data.batch import micro_batches
from afina.data.template import Rendered
from afina.model.attach import attach, learning
from afina.model.loss import summed_loss
from afina.model.packed import covers, packed_attention
from afina.recipe.schema import Full, Lora, PrefixTuning, PromptTuning, Training
from afina.train.loop import accumulate, train
from afina.train.state import Follower, StepReport, begin
from afina.train.watch import Diverged, Rejection


def rows(count: int, seed: int = 0, longest: int = 40) -> list[Rendered]:
    """Random samples of odd lengths, about half of whose tokens are learnt; one whose first token is marked too."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(2, longest))
        learnt = random.random(length) < 0.5
        learnt[-1] = True
        learnt[0] = number == 0
        made.append(Rendered(random.integers(3, 97, length).astype(np.int32), learnt))
    return made


CUTS = {
    "8 at once, padded": dict(budget=10_000, packing=False),
    "2 x 4, padded": dict(budget=160, packing=False),
    "1 at a time": dict(budget=1, packing=False),
    "packed in one row": dict(budget=10_000, packing=True),
    "packed in several rows": dict(budget=64, packing=True),
}


def gradients(method, cut, *, packed: bool, dtype=torch.float64):
    samples = rows(8)
    model = llama().to(dtype)
    model = perturb_adapters(attach(model, method, seed=3).to(dtype))
    packed = packed and covers(model)
    cut = {**cut, "packing": cut["packing"] and covers(model)}
    batches = micro_batches(samples, range(8), pad_id=0, **cut)
    learnt = sum(batch.targets.numel() for batch in batches)
    model.train()
    with packed_attention(model, packed):
        loss = accumulate(model, batches, learnt, 0, 0, CPU, summed_loss)
    return loss.item(), {name: parameter.grad.clone() for name, parameter in learning(model)}, learnt


METHODS = [
    Lora(rank=4),
    Full(name="full"),
    PromptTuning(name="prompt-tuning", virtual_tokens=3),
    PrefixTuning(name="prefix-tuning", virtual_tokens=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("engine", ["reference", "packed attention"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_loss_and_gradients_do_not_depend_on_how_a_step_is_cut(method, cut, engine, dtype, tolerance):
    if engine == "packed attention" and not CUTS[cut]["packing"]:
        pytest.skip("padded rows always run on the reference")
    plain_loss, plain, plain_learnt = gradients(method, CUTS["1 at a time"], packed=False, dtype=dtype)
    loss, found, learnt = gradients(method, CUTS[cut], packed=engine != "reference", dtype=dtype)
    assert learnt == plain_learnt
    assert loss == pytest.approx(plain_loss, rel=1e-6)  # the loss itself is taken in fp32
    assert found.keys() == plain.keys()
    assert all(gradient.norm() > 0 for gradient in plain.values())
    error = torch.stack([(found[name] - plain[name]).norm() for name in plain]).norm()
    assert error <= tolerance * torch.stack([gradient.norm() for gradient in plain.values()]).norm()


def test_the_loss_is_the_mean_over_learnt_tokens_of_the_whole_step():
    samples, model = rows(8), llama()
    total, count = 0.0, 0
    for row in samples:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0].double()
        for place in range(1, len(row.ids)):
            if row.learnt[place]:
                total -= torch.log_softmax(logits[place - 1], -1)[row.ids[place]].item()
                count += 1
    batches = micro_batches(samples, range(8), budget=100, packing=False, pad_id=0)
    loss = accumulate(attach(model, Lora(), seed=0), batches, count, 0, 0, CPU, summed_loss)
    assert loss.item() == pytest.approx(total / count, rel=1e-6)


class Listener(Follower):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.rejections: list[Rejection] = []

    def on_step(self, report, samples):
        self.reports.append(report)

    def on_rejection(self, rejection):
        self.rejections.append(rejection)


def run(model, samples, **changes) -> list[StepReport]:
    listener = Listener()
    training = Training(**{"learning_rate": 1e-2, "warmup": 0, **changes})

    def make_step(step):
        return micro_batches(samples, range(len(samples)), budget=64, packing=False, pad_id=0)

    train(
        model,
        make_step,
        begin(model, training, CPU),
        steps=12,
        training=training,
        seed=1,
        hardware=CPU,
        loss_fn=summed_loss,
        follower=listener,
    )
    return listener.reports


def test_learning_lowers_the_loss_and_leaves_the_base_alone():
    model = attach(llama(), Lora(rank=8, dropout=0.1), seed=0)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    reports = run(model, rows(6))
    assert reports[-1].loss < reports[0].loss - 0.5
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())


def test_the_same_seed_gives_the_same_run_to_the_bit():
    runs = [run(attach(llama(), Lora(dropout=0.2), seed=0), rows(6)) for _ in range(2)]
    assert [report.loss for report in runs[0]] == [report.loss for report in runs[1]]


def test_losses_that_are_no_numbers_are_not_learnt_and_three_in_a_row_end_the_run_naming_the_samples():
    model, listener = attach(llama(), Lora(), seed=0), Listener()
    state = begin(model, Training(), CPU)
    before = {name: parameter.clone() for name, parameter in learning(model)}

    def broken(model, batch):
        return summed_loss(model, batch) * float("nan")

    with pytest.raises(Diverged, match=r"3 steps in a row.* step 3"):
        train(
            model,
            lambda step: micro_batches(rows(3), range(3), budget=64, packing=True, pad_id=0),
            state,
            steps=9,
            training=Training(),
            seed=0,
            hardware=CPU,
            loss_fn=broken,
            follower=listener,
        )
    assert all(rejection.samples == (0, 1, 2) and rejection.loss is None for rejection in listener.rejections)
    assert [rejection.step for rejection in listener.rejections] == [1, 2, 3]
    assert all(torch.equal(parameter, before[name]) for name, parameter in learning(model))
    assert all(not moments["exp_avg"].any() and moments["step"] == 0 for moments in state.optimizer.state.values())
