"""Optimizers over one part of the partition, whose moments travel as named tensors."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from srfed.config import RunConfig, TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Adam's state of one tensor, as torch names it."""


def build_optimizer(
    config: TrainingConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Adam (fused) or plain SGD over the parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def learning_rate_factor(config: RunConfig, round_number: int) -> float:
    """What the learning rates of a round, from 1, are multiplied by: 1, or a half cosine over the rounds."""
    if config.training.learning_rate_schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (round_number - 1) / config.federation.rounds))


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the moments that :func:`export_moments` took; parameters without any start afresh."""
    for name, parameter in parameters.items():
        if f"exp_avg.{name}" in moments:
            optimizer.state[parameter] = {
                key: moments[f"{key}.{name}"].to(parameter.device, copy=True) for key in MOMENTS
            }


def export_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's moments as CPU tensors named "exp_avg.<parameter>" and so on; empty for SGD."""
    moments = {}
    for key in MOMENTS:
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            if key in state:
                moments[f"{key}.{name}"] = state[key].detach().cpu().clone()
    return moments
