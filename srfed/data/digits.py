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
        ink, labels = _ink_and_labels()
        # It counts from 0 to 16.
        images = np.rint(ink * (255 / 16)).astype(np.uint8)
        return Labelled(images[..., None], labels), None

    return LabelledSource(config, [f"digit-{label}" for label in range(10)], range(10), read)


def _ink_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """N x 8 x 8 and (N,), as scikit-learn's ``load_digits`` gives them; read from the file that it
    reads, since to import it takes longer than all else before the first training step but PyTorch.
    """
    found = find_spec("sklearn")
    for place in (found and found.submodule_search_locations) or ():
        path = Path(place, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
