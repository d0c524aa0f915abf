"""What an owner would have without the others: the same network from the same beginning, trained by
the same minibatches at the same rates for as many steps, and sent to nobody.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from srfed.config import TrainingConfig
from srfed.flat import copies
from srfed.networks.partition import Exclusive, Shared
from srfed.training.ema import round_decay, update_average
from srfed.training.local import LocalTrainer
from srfed.training.part import ClientState, Part

BEST, BEST_LOSS, BEST_ROUND = "best", ".best_loss", ".best_round"
MINIBATCHES, STEPS, EXCLUSIVE_STEPS = ".minibatches", ".steps", ".exclusive_steps"


@dataclass(frozen=True)
class Alone:
    """An owner's model of its own images alone (CPU tensors by name).

    Attributes:
        core: the tensors that are φ elsewhere; here they are exclusive like all others.
        state: θ_i of this model, the moments of both, the place in the order of minibatches.
        best: all tensors, averaged, as they were in the best round; empty before the first.
        best_loss: of the validation images in that round; infinite where there are none.
        best_round: its number; 0 before the first.
    """

    core: Part[Exclusive]
    state: ClientState
    best: Exclusive = field(default_factory=lambda: Exclusive({}))
    best_loss: float = float("inf")
    best_round: int = 0

    @property
    def averages(self) -> Exclusive:
        """All tensors, averaged, as they are now."""
        return Exclusive({**self.core.average, **self.state.exclusive.average})

    def judged(self, round_number: int, loss: float | None) -> "Alone":
        """The same with its best round so far; without a validation loss that is the last one."""
        if loss is not None and not loss < self.best_loss:
            return self
        return replace(
            self,
            best=Exclusive(copies(self.averages)),
            best_loss=float("inf") if loss is None else loss,
            best_round=round_number,
        )


def begin_alone(shared: Shared, state: ClientState) -> Alone:
    """The model before its first round.

    Args:
        shared: φ_0.
        state: with θ_0.
    """
    return Alone(Part(Exclusive(copies(shared)), Exclusive(copies(shared))), state)


def train_alone(
    training: TrainingConfig, trainer: LocalTrainer, round_number: int, alone: Alone
) -> Alone:
    """Train for one round as the client does in it, but from what the owner has had before.

    Args:
        training: the run's settings.
        trainer: the client's own.
        round_number: part of the seeds; the place in the rates' schedule.
        alone: after its last round.
    """
    core = alone.core
    result = trainer.train(round_number, Shared(core.weights), alone.state)
    # What the server does with φ's average, of one client.
    average = copies(core.average)
    decay = round_decay(training.ema_decay, training.ema_warmup, core.steps, result.shared_steps)
    update_average(average, result.shared, decay)
    return replace(
        alone,
        core=Part(
            Exclusive(dict(result.shared)),
            Exclusive(average),
            steps=core.steps + result.shared_steps,
        ),
        state=result.state,
    )


def to_memory(alone: Alone) -> dict[str, Tensor]:
    """As named tensors, for a client's memory."""
    groups: Mapping[str, Mapping[str, Tensor]] = {
        "core": alone.core.weights,
        "core_average": alone.core.average,
        "exclusive": alone.state.exclusive.weights,
        "average": alone.state.exclusive.average,
        "moments": alone.state.exclusive.moments,
        "shared_moments": alone.state.shared_moments,
        BEST: alone.best,
    }
    return {
        **{
            f"{group}/{name}": t for group, members in groups.items() for name, t in members.items()
        },
        MINIBATCHES: torch.tensor(alone.state.minibatches),
        STEPS: torch.tensor(alone.core.steps),
        EXCLUSIVE_STEPS: torch.tensor(alone.state.exclusive.steps),
        BEST_LOSS: torch.tensor(alone.best_loss, dtype=torch.float64),
        BEST_ROUND: torch.tensor(alone.best_round),
    }


def from_memory(memory: Mapping[str, Tensor]) -> Alone:
    """What :func:`to_memory` was given; raises KeyError where a number is missing."""

    def group(wanted: str) -> dict[str, Tensor]:
        named = ((name.partition("/"), tensor) for name, tensor in memory.items())
        return {member: tensor for (found, _, member), tensor in named if found == wanted}

    return Alone(
        Part(Exclusive(group("core")), Exclusive(group("core_average")), steps=int(memory[STEPS])),
        ClientState(
            Part(
                Exclusive(group("exclusive")),
                Exclusive(group("average")),
                group("moments"),
                int(memory[EXCLUSIVE_STEPS]),
            ),
            group("shared_moments"),
            int(memory[MINIBATCHES]),
        ),
        Exclusive(group(BEST)),
        float(memory[BEST_LOSS]),
        int(memory[BEST_ROUND]),
    )
