"""The UCI digits that scikit-learn carries: 1,797 grey images of 8 x 8 pixels, no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from srfed.config import DataConfig
from srfed.data.source import Labelled, LabelledSource


def open_digits(config: DataConfig) -> LabelledSource:
    """Ten tasks, digit-0 to digit-9.

    The set has no test split: :func:`~srfed.data.source.split` holds out the end of the file, which
    other people wrote than its beginning. ``data.dir`` is not used.
    """

    def read() -> tuple[Labelled, None]:
        # Its file alone: to import scikit-learn takes a process as long as to import PyTorch.
        package = find_spec("sklearn")
        assert package is not None
        assert package.origin is not None
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",")
        # Ink counts from 0 to 16; the last column is the digit.
        images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        return Labelled(images, table[:, -1].astype(np.int64)), None

    return LabelledSource(config, [f"digit-{label}" for label in range(10)], range(10), read)
