"""The common initialisation: each module's values follow from (seed, name) alone.

So φ_0 is the same whoever builds it, whatever the number of image channels, and whatever other
modules the network has.
"""

import torch
from torch import Tensor, nn

from srfed.randomness import derive_seed


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Draw the values of every module that knows how (``reset_parameters``, as torch's do), from a
    seed of its own.

    What a constructor has set to one value, such as a zero or a one, stays.
    """
    for name, module in network.named_modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        own = dict(module.named_parameters(recurse=False))
        if reset is None or not own:
            continue
        kept = {key: value.clone() for key, value in own.items() if _is_set(value)}
        with torch.random.fork_rng(devices=[]):
            # Of the CPU alone: all devices' keep a stack for each call, slower than the draws.
            torch.default_generator.manual_seed(derive_seed(seed, "initialisation", name))
            reset()
        for key, value in kept.items():
            own[key].copy_(value)


def _is_set(values: Tensor) -> bool:
    """Whether all values are one, which no draw gives; a single value may be drawn, unless it is a
    zero or a one.
    """
    first = values.flatten()[0]
    return bool((values == first).all()) and (values.numel() > 1 or float(first) in (0.0, 1.0))
