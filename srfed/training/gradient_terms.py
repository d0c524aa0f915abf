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
        within: whose they are a part of, and its place there; see :meth:`of_owner`.
    """

    def __init__(
        self,
        training: TrainingConfig,
        weights: Mapping[str, nn.Parameter],
        within: "tuple[GradientTerms, int] | None" = None,
    ) -> None:
        self._training = training
        self._weights, self._strength = weights, training.proximal
        if within is None:
            wanted = (training.proximal, training.control_variates, training.control_variates)
            self._tensors = [
                {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()}
                if one
                else {}
                for one in wanted
            ]
        else:
            whole, place = within
            self._tensors = [
                {name: tensor[place] for name, tensor in some.items()} for some in whole._tensors
            ]
        self._anchor, self._correction, self._sum = self._tensors

    def of_owner(self, place: int, weights: Mapping[str, nn.Parameter]) -> "GradientTerms":
        """Those of one owner, where the first dimension of all is the owner; φ of that owner are
        these weights, and what either does to its terms is done to both.
        """
        return GradientTerms(self._training, weights, (self, place))

    @torch.no_grad()
    def begin(self, correction: Control | None = None) -> None:
        """Begin a round at the weights as they are now.

        Args:
            correction: c - c_i, under ``training.control_variates``; None stands for zeros.
        """
        load_tensors(self._anchor, {name: self._weights[name] for name in self._anchor})
        if self._sum:
            torch._foreach_zero_([*self._correction.values(), *self._sum.values()])
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
        if not self._sum:
            return {}
        means = torch._foreach_div(list(self._sum.values()), steps)
        return dict(zip(self._sum, means, strict=True))
