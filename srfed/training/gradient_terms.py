"""What a client adds to φ's gradient: FedProx's pull before clipping, control variates after it.

All of it lies in tensors that stay where they are in memory, so that a captured step goes on
working.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from srfed.config import TrainingConfig
from srfed.networks.partition import Control
from srfed.training.part import load_tensors


class GradientTerms:
    """The terms that a run's settings ask for; none of them by default.

    Args:
        training: the run's settings.
        weights: φ.
    """

    def __init__(self, training: TrainingConfig, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights, self._strength = weights, training.proximal
        self._anchor, self._correction, self._sum = (
            {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()}
            if wanted
            else {}
            for wanted in (training.proximal, training.control_variates, training.control_variates)
        )

    @torch.no_grad()
    def begin(self, correction: Control | None = None) -> None:
        """Begin a round at the weights as they are now.

        Args:
            correction: c - c_i, under ``training.control_variates``; None stands for zeros.
        """
        load_tensors(self._anchor, {name: self._weights[name] for name in self._anchor})
        for tensor in (*self._correction.values(), *self._sum.values()):
            tensor.zero_()
        load_tensors(self._correction, correction or {})

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Add the gradient of FedProx's term, strength / 2 · ‖φ - anchor‖² (Li et al. 2020, eq.
        2).
        """
        for name, anchor in self._anchor.items():
            parameter = self._weights[name]
            assert parameter.grad is not None
            parameter.grad.add_(parameter - anchor, alpha=self._strength)

    @torch.no_grad()
    def after_clipping(self) -> None:
        """Take the gradient into the round's mean, then add c - c_i to it (Karimireddy et al. 2020,
        eq. 3). Where a tensor has no gradient, that is one of zeros.
        """
        moved = [name for name in self._correction if self._weights[name].grad is not None]
        gradients: list[Tensor] = [self._weights[name].grad for name in moved]  # type: ignore[misc]
        if moved:
            torch._foreach_add_([self._sum[name] for name in moved], gradients)
            torch._foreach_add_(gradients, [self._correction[name] for name in moved])
        for name in self._correction.keys() - moved:
            self._weights[name].grad = self._correction[name].clone()

    def mean_gradient(self, steps: int) -> dict[str, Tensor]:
        """The mean over so many steps of the gradients as they were clipped, without c - c_i; empty
        without control variates.
        """
        return {name: total / steps for name, total in self._sum.items()}
