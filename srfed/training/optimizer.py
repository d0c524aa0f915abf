"""Optimizers over one part of the partition, whose moments travel as named tensors."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from srfed.config import RunConfig, TrainingConfig
from srfed.flat import copies, sent, zeros_in_a_row

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Adam's state of one tensor, as torch names it."""
BETA1, BETA2 = 0.9, 0.999
"""Decays of Adam's two moments, torch's defaults."""
ADAM_REACH = (1 - BETA1) / math.sqrt((1 - BETA2) * (1 - BETA1**2 / BETA2))
"""What Adam's step can be at most, in learning rates, of any value after any gradients: 7.27.

By Cauchy and Schwarz (Σ β1^k |g_k|)² ≤ Σ (β1² / β2)^k · Σ β2^k g_k², so that |m| ≤ 7.27 √v; for a
mean of several clients' moments too, as the root is concave. The correction √(1 - β2^t) / (1 -
β1^t) is below 1 and approaches it, so a gradient that grows by β2 / β1 a step comes as near as one
likes. A single gradient after none for long, the case that is named most often, moves (1 - β1) /
√(1 - β2) = 3.16.
"""
ROUNDING = 2.0**-23
"""What one float32 step may be off, in units of the value: twice half a last place."""
MARGIN = 1.001
"""For the rounding of the step itself."""


@dataclass(frozen=True)
class Reach:
    """How far φ can come from where it was in a round, as Euclidean norms.

    Attributes:
        usual: one learning rate a step for every value; honest clients with Adam come 0.13 to 0.42
            of it far.
        largest: more than the optimizer can do, whatever the images.
        usual_value, largest_value: the same of a single value, in any round of the run.
    """

    usual: float
    largest: float
    usual_value: float
    largest_value: float


def reach_of_round(
    config: RunConfig, round_number: int, steps: int, shared: Mapping[str, Tensor]
) -> Reach | None:
    """How far φ can be moved by so many optimizer steps; None where nothing bounds it: SGD without
    clipping.

    FedProx's pull is a gradient like any other, and clipped with it. Control variates are added to
    the clipped gradient: c and c_i, neither longer than a clipped gradient.

    Args:
        config: the run's configuration.
        round_number: the round, for the learning rate.
        steps: optimizer steps on φ.
        shared: φ at the round's beginning.
    """
    training = config.training
    # No schedule goes above the full rate.
    highest = training.learning_rate
    rate = training.learning_rate * learning_rate_factor(config, round_number)
    rounding = ROUNDING * math.sqrt(
        sum(float(tensor.double().square().sum()) for tensor in shared.values())
    )
    if training.optimizer == "adam":
        step = MARGIN * rate * math.sqrt(sum(tensor.numel() for tensor in shared.values()))
        value = MARGIN * highest
        return Reach(
            usual=steps * (step + rounding),
            largest=steps * (ADAM_REACH * step + rounding),
            usual_value=steps * (value + rounding),
            largest_value=steps * (ADAM_REACH * value + rounding),
        )
    if training.gradient_clip is None:
        return None
    gradient = training.gradient_clip * (3 if training.control_variates else 1)
    farthest = steps * (MARGIN * rate * gradient + rounding)
    value = steps * (MARGIN * highest * gradient + rounding)
    return Reach(farthest, farthest, value, value)


class PartOptimizer:
    """Adam (fused, torch's defaults) or plain SGD over one part, with the bits of ``torch.optim``'s
    own classes.

    Those are not used because the first of them in a process imports torch._dynamo, which takes
    over a second, and a deployed client is a fresh process for every message. Their functional
    forms import nothing.

    Parameters that the network owns may have a rate of their own; otherwise they are like any.

    Adam's moments stay where they are in memory, so that a captured step goes on working after
    :meth:`begin`.

    Several owners' parameters may be given with the owner as first dimension; each owner then has
    an optimizer of its own over its part of them, :meth:`of_owner`, which is to begin a round, and
    a step of all is one step here, where :attr:`history` is everybody's.

    Args:
        config: says which of the two.
        parameters: the part by name; may be empty.
        learning_rate, moments: see :meth:`begin`.
        owned: names of the parameters that may have a rate of their own.
        owned_rate: see :meth:`begin`.
        owners: how many are the first dimension; None: these are one owner's.

    Attributes:
        owners: the same.
        started: the parameters that have moments.
        history: equal for owners whose parameters have all had the same number of steps when they
            began; empty for anybody else.

    Raises:
        KeyError: ``moments`` has a parameter's "exp_avg" without the others.
    """

    def __init__(
        self,
        config: TrainingConfig,
        parameters: Mapping[str, nn.Parameter],
        learning_rate: float,
        moments: Mapping[str, Tensor] | None = None,
        *,
        owned: Collection[str] = (),
        owned_rate: float | None = None,
        owners: int | None = None,
    ) -> None:
        self._config, self._owned, self.owners = config, owned, owners
        self._kind = config.optimizer
        self._parameters = dict(parameters)
        self._groups = [
            [name for name in self._parameters if (name in owned) == apart]
            for apart in (False, True)
        ]
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._whole: tuple[PartOptimizer, int] | None = None
        self.started: set[str] = set()
        self.history: tuple[object, ...] = ()
        device = next(
            (parameter.device for parameter in self._parameters.values()), torch.device("cpu")
        )
        # Tensors, because a captured step would keep the numbers that it was captured with.
        self._captured_rates = (
            [torch.zeros((), device=device) for _ in self._groups]
            if device.type == "cuda"
            else None
        )
        self.begin(learning_rate, moments, owned_rate)

    def of_owner(self, place: int, parameters: Mapping[str, nn.Parameter]) -> "PartOptimizer":
        """The optimizer of one of the owners, whose parameters these are; its moments are this
        one's.
        """
        one = PartOptimizer(self._config, parameters, 0.0, owned=self._owned)
        one._whole = self, place
        # All that are trained at once are in one round, and so at its rates.
        one._captured_rates = self._captured_rates
        return one

    def begin(
        self,
        learning_rate: float,
        moments: Mapping[str, Tensor] | None = None,
        owned_rate: float | None = None,
    ) -> None:
        """Go on from other moments, at another rate.

        Args:
            learning_rate: the rate of every step.
            moments: what :meth:`export_moments` gave, on any device; it is copied. Parameters that
                are not in it start afresh.
            owned_rate: the rate of the owned parameters; None takes ``learning_rate``.

        Raises:
            KeyError: ``moments`` has a parameter's "exp_avg" without the others.
        """
        self._rates = [learning_rate, learning_rate if owned_rate is None else owned_rate]
        if self._captured_rates is not None:
            for held, rate in zip(self._captured_rates, self._rates, strict=True):
                held.fill_(rate)
        self.started = {
            name for name in self._parameters if moments and f"exp_avg.{name}" in moments
        }
        if self._whole is not None:
            self._whole[0]._rates = self._rates
            if self._whole[0]._buffers and not self._buffers:
                # Who has stepped as one has moments there, and has not asked for them yet.
                self._buffers = self._of_whole()
            self.history = self._begins(moments or {})
        there: list[Tensor] = []
        given: list[Tensor] = []
        fresh: list[Tensor] = []
        for name in self._parameters:
            if name in self.started:
                assert moments is not None
                for key, buffer in self._buffer(name).items():
                    there.append(buffer)
                    given.append(moments[f"{key}.{name}"])
            elif name in self._buffers:
                fresh.extend(self._buffers[name].values())
        if there:
            torch._foreach_copy_(there, sent(given, there[0].device))
        if fresh:
            torch._foreach_zero_(fresh)

    def clear_gradients(self) -> None:
        """Set every gradient of the part to None."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step on the parameters that have a gradient; others, and their moments, stay as they
        are.
        """
        for group, names in enumerate(self._groups):
            if active := [name for name in names if self._parameters[name].grad is not None]:
                self._step(active, group)

    def _step(self, names: Sequence[str], group: int) -> None:
        parameters: list[Tensor] = [self._parameters[name] for name in names]
        gradients = [
            gradient for name in names if (gradient := self._parameters[name].grad) is not None
        ]
        if self._kind == "sgd":
            sgd(
                parameters,
                gradients,
                [None] * len(parameters),
                lr=self._rates[group],
                weight_decay=0,
                momentum=0,
                dampening=0,
                nesterov=False,
                maximize=False,
            )
            return
        averages, squares, counts = ([self._buffer(name)[key] for name in names] for key in MOMENTS)
        # Everybody's are equal.
        steps = counts if self.owners is None else [count[0] for count in counts]
        adam(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            fused=True,
            lr=(self._captured_rates or self._rates)[group],
            beta1=BETA1,
            beta2=BETA2,
            eps=1e-8,
            weight_decay=0,
            amsgrad=False,
            maximize=False,
        )
        if self.owners is not None:
            torch._foreach_add_([count[1:] for count in counts], 1)
        self.mark_started(names)

    def mark_started(self, names: Iterable[str]) -> None:
        """Say that these parameters have had a step, which a captured step cannot say for
        itself.
        """
        self.started.update(names)

    @property
    def moments(self) -> dict[str, Tensor]:
        """Adam's moments as they are in memory, where the next step changes them; empty for SGD.

        "exp_avg.<parameter>" and "exp_avg_sq.<parameter>" have the parameter's shape,
        "step.<parameter>" has none; all three are missing for a parameter that never had a
        gradient.
        """
        return {
            f"{key}.{name}": self._buffer(name)[key]
            for key in MOMENTS
            for name in self._parameters
            if name in self.started
        }

    def export_moments(self) -> dict[str, Tensor]:
        """The moments as contiguous CPU tensors of their own."""
        return copies(self.moments, by_name=True)

    def _begins(self, moments: Mapping[str, Tensor]) -> tuple[object, ...]:
        names = [name for name in self._parameters if name in self.started]
        counts = torch.stack([moments[f"step.{name}"] for name in names]) if names else None
        return (*names, *([] if counts is None else counts.tolist()))

    def _buffer(self, name: str) -> dict[str, Tensor]:
        if not self._buffers:
            self._buffers = self._of_whole() or _fresh_states(self._parameters, self.owners)
        return self._buffers[name]

    def _of_whole(self) -> dict[str, dict[str, Tensor]]:
        if self._whole is None:
            return {}
        whole, place = self._whole
        return {
            name: {key: whole._buffer(name)[key][place] for key in MOMENTS}
            for name in self._parameters
        }


def learning_rate_factor(config: RunConfig, round_number: int) -> float:
    """What the learning rates of a round, from 1, are multiplied by, at most 1: 1; a half cosine
    over the rounds; or a line from 1 in round 1 to the floor in round ``decay_rounds``, constant
    after that. In each of the w first rounds, ``warmup_rounds``, round k has k / (w + 1) of it.

    A fall over one round has the full rate in round 1 as well, and the floor's after it.
    """
    training, rounds = config.training, config.federation.rounds
    warm = min(1.0, round_number / (training.warmup_rounds + 1))
    if training.learning_rate_schedule == "constant":
        return warm
    if training.learning_rate_schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * (round_number - 1) / rounds))
    fall = max(1, (training.decay_rounds or rounds) - 1)
    return warm * (1 - (1 - training.learning_rate_floor) * min(1.0, (round_number - 1) / fall))


class Rates(NamedTuple):
    """The learning rates of a round: of φ, of θ_i, and of what of θ_i the network owns."""

    shared: float
    exclusive: float
    owned: float


def rates_of_round(config: RunConfig, round_number: int) -> Rates:
    """The learning rates of a round, from 1."""
    training, factor = config.training, learning_rate_factor(config, round_number)
    exclusive = training.exclusive_learning_rate or training.learning_rate
    return Rates(
        factor * training.learning_rate,
        factor * exclusive,
        factor * (training.owned_learning_rate or exclusive),
    )


def _fresh_states(
    parameters: Mapping[str, nn.Parameter], owners: int | None
) -> dict[str, dict[str, Tensor]]:
    counted = () if owners is None else (owners,)
    if all(p.is_contiguous() and p.device.type == "cpu" for p in parameters.values()):
        # One after another in the order in which they are stored, and so written as one.
        names = sorted(parameters)
        shapes = [parameters[name].shape for name in names]
        moments = [zeros_in_a_row(shapes) for _ in range(2)]
        columns = [*moments, zeros_in_a_row([counted] * len(names))]
        rows = zip(*columns, strict=True)
        return {
            name: dict(zip(MOMENTS, row, strict=True))
            for name, row in zip(names, rows, strict=True)
        }
    # In the parameter's own memory layout, which moments that come from a file do not have: the
    # fused kernel pairs elements by their place in memory.
    return {
        name: {
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            "step": torch.zeros(counted, device=parameter.device),
        }
        for name, parameter in parameters.items()
    }
