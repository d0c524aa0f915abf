"""Are samples as bright, as coloured and as varied as real images?"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from srfed.data.images import Images
from srfed.records import Colour

_AT_ONCE = 256
"""Images whose levels are added up at a time."""


def colours(real: Mapping[str, Images], samples: Mapping[str, Images]) -> dict[str, Colour]:
    """Compare samples with the held-out images of the same task, where both are there.

    Args:
        real, samples: uint8 N x H x W x C by task.
    """
    return {
        name: _compared(_of_each(real[name]), _of_each(images))
        for name, images in samples.items()
        if len(images) and len(real.get(name, ())) and real[name].shape[-1] == images.shape[-1]
    }


def _of_each(images: Images) -> NDArray[np.float64]:
    """The mean colour of each image, N x C, in levels of 0 to 255."""
    blocks = [images[first : first + _AT_ONCE] for first in range(0, len(images), _AT_ONCE)]
    return np.concatenate([block.mean(axis=(1, 2), dtype=np.float64) for block in blocks])


def _compared(real: NDArray[np.float64], samples: NDArray[np.float64]) -> Colour:
    return Colour(
        samples=tuple(samples.mean(axis=0).tolist()),
        real=tuple(real.mean(axis=0).tolist()),
        samples_spread=_spread(samples),
        real_spread=_spread(real),
        samples_count=len(samples),
        real_count=len(real),
    )


def _spread(means: NDArray[np.float64]) -> float:
    """Root mean square over the channels of the images' standard deviation; of one image 0."""
    if len(means) < 2:
        return 0.0
    return float(np.sqrt(means.var(axis=0, ddof=1).mean()))
