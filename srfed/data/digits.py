"""The UCI digits that scikit-learn carries: 1,797 grey images of 8 x 8 pixels, no download."""

import numpy as np

from srfed.config import DataConfig
from srfed.data.source import Labelled, LabelledSource


def open_digits(config: DataConfig) -> LabelledSource:
    """Ten tasks, digit-0 to digit-9.

    The set has no test split: :func:`~srfed.data.source.split` holds out the end of the file, which
    other people wrote than its beginning. ``data.dir`` is not used.
    """

    def read() -> tuple[Labelled, None]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Ink counts from 0 to 16.
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return Labelled(images[..., None], digits.target), None

    return LabelledSource(config, [f"digit-{label}" for label in range(10)], range(10), read)
