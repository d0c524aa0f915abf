"""Exponential moving averages of weights, per local step at a client and per round at the
server.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def step_decay(decay: float, warmup: bool, step: int) -> float:
    """The decay of the step that follows ``step`` earlier ones; warm-up caps it at (1 + step) / (10
    + step).
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def round_decay(decay: float, warmup: bool, first_step: int, steps: int) -> float:
    """The decay of ``steps`` local steps taken as one: the product of their decays."""
    product = 1.0
    for step in range(first_step, first_step + steps):
        product *= step_decay(decay, warmup, step)
    return product


@torch.no_grad()
def update_average(
    average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float
) -> None:
    """average ← decay · average + (1 - decay) · weights, in place, tensor by tensor of the same
    name.
    """
    if average:
        torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1 - decay)
