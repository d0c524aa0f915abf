"""Whether a network of one's own can be repeated bit by bit on a GPU, found out on a CPU."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from srfed.config import OwnNetworkConfig, RunConfig
from srfed.diffusion.objective import Objective
from srfed.errors import UserError
from srfed.model import build_model

_NEVER = re.compile(
    # Those of the documentation of torch.use_deterministic_algorithms that a GPU refuses then, and
    # those that it repeats under that switch alone, which slows all others.
    r"(upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)|_upsample_bi\w+_aa|grid_sampler_[23]d"
    r"|(reflection|replication)_pad[123]d|_?adaptive_(avg|max)_pool[23]d|avg_pool3d"
    r"|max_pool3d_with_indices|fractional_max_pool[23]d|nll_loss2d|_ctc_loss)_backward"
    r"|index_(add|reduce)_?|scatter_(add|reduce)_?|put_?|cumsum_?|histc|kthvalue|max_unpool[23]d"
)


class _Seen(TorchDispatchMode):
    """Notes the operations that a GPU cannot repeat."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        # Whole numbers have one sum, in any order.
        if _NEVER.fullmatch(name) and args[0].is_floating_point():
            self.operations.add(name)
        return func(*args, **(kwargs or {}))


def check_repeatable(
    config: RunConfig, objective: Objective, shape: tuple[int, int, int], device: torch.device
) -> None:
    """Raise UserError where ``resources.deterministic`` is asked for on a GPU, and a training step
    of a network of one's own takes an operation that no GPU repeats bit by bit.

    Args:
        config: the run's configuration.
        objective: what the network learns to predict, on the CPU.
        shape: H, W, C of an image.
        device: where the run trains.
    """
    if device.type != "cuda" or not config.resources.deterministic:
        return
    # The package's own has been seen to repeat itself.
    if not isinstance(config.model, OwnNetworkConfig):
        return
    height, width, channels = shape
    model, generator = build_model(config, channels), torch.Generator().manual_seed(0)
    images = torch.randn((2, channels, height, width), generator=generator)
    tasks = [torch.zeros(2, dtype=torch.long)] if model.tasks else []
    with _Seen() as seen:
        objective.loss(
            lambda x, t: model(x, t, *tasks),
            images,
            objective.draw_times(2, generator),
            torch.randn(images.shape, generator=generator),
        ).mean().backward()
    if seen.operations:
        raise UserError(
            f"resources.deterministic true: model.network {config.model.network} takes "
            f"{', '.join(sorted(seen.operations))}, which no GPU repeats bit by bit; allowed: "
            "false, device cpu, or another operation in its place"
        )
