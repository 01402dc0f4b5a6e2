"""What the loop changes, step by step, and whom it tells. Everything that a checkpoint must hold is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from afina.data.batch import Batch
from afina.errors import ResourceError
from afina.language import _
from afina.model.load import Hardware
from afina.recipe.schema import Full, Lora, Method, Training
from afina.train.optimizer import make_optimizer
from afina.train.watch import Rejection, Watch
from afina.train.zeros import hold_zeros

T = TypeVar("T")


@dataclass
class State:
    """All that a step changes. `step`: steps behind us; `validated`: the last of them after which that was done.

    `last`: the step that ends the run before its time, once there is reason to.
    """

    learning: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    validated: int = 0
    last: int | None = None


def begin(model: nn.Module, training: Training, hardware: Hardware, method: Method | None = None) -> State:
    """The state before the first step: in fp16 the loss is scaled so that small gradients do not vanish."""
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    whole: Any = model
    ends = [end for end in (whole.get_input_embeddings(), whole.get_output_embeddings()) if end is not None]
    outside = [parameter for end in ends for parameter in end.parameters()]
    faster = method.lora_plus_ratio if isinstance(method, Lora) else 1.0
    optimizer = make_optimizer(learning, training, faster=faster, outside=outside)
    if isinstance(method, Full) and method.keep_zeros:
        hold_zeros(model, optimizer)
    return State(learning, optimizer, scaler)


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did. `loss` is nats per learnt token; `seconds` of wall-clock time."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    learnt: int
    seconds: float


class Follower:
    """Whom the loop tells what happens, and asks what it cannot know. This one follows nothing and saves nothing."""

    def on_step(self, report: StepReport, samples: Sequence[int]) -> None:
        """A step was taken, on these samples."""

    def on_rejection(self, rejection: Rejection) -> None:
        """A step was not taken; weights and optimiser are as before it."""

    def on_validation(self, state: State) -> None:
        """It is time to measure how good these weights are; the model is in evaluation mode."""

    def on_whole(self, state: State) -> None:
        """Between two steps, before the first and after the last: now the state may be saved."""

    def go_back(self, state: State) -> None:
        """Too many rejections in a row: turn the state back to the last good checkpoint, or raise Diverged."""
        state.watch.hope = False
        state.watch.go_back(state.watch.dump())

    def on_out_of_memory(self, step: int, batches: Sequence[Batch]) -> None:
        """These did not fit: make smaller ones of this step next time, or raise ResourceError."""
        raise ResourceError(_("The memory does not hold the micro-batches of step {step}.").format(step=step + 1))

    def on_torn(self, state: State) -> None:
        """The memory ran out while the optimiser stepped: turn back to a checkpoint, or raise ResourceError."""
        raise ResourceError(
            _("The memory does not hold what the optimiser needs for step {step}.").format(step=state.step + 1)
        )

    def compute(self, work: Callable[[], T]) -> T:
        """Do a forward and backward pass, which changes nothing that is saved: it may be interrupted anywhere."""
        return work()
