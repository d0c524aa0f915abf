"""MNIST and Fashion-MNIST, from the idx files that torchvision downloads, packed or unpacked."""

import gzip
from pathlib import Path

import numpy as np

from srfed.config import DataConfig
from srfed.data.images import Images
from srfed.data.source import Labelled, LabelledSource, data_path, slugs
from srfed.data.verified import how_to_get, read_verified
from srfed.errors import UserError

UNSIGNED_BYTE = 8
"""The idx format's code of the element type."""


def open_idx(config: DataConfig) -> LabelledSource:
    """Ten tasks in the published order; training and test images are those of the official splits.

    ``data.dir`` is torchvision's root, which holds ``MNIST/raw`` or ``FashionMNIST/raw``. It may be
    read-only: the .gz files are read as they are.

    Raises:
        UserError: a file is missing; on loading, a file is not what was published.
    """
    from torchvision import datasets

    published = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[config.dataset]
    root = data_path(config, f"the folder that holds {published.__name__}/raw")
    raw = root / published.__name__ / "raw"
    for name, _ in published.resources:
        if not (raw / name).is_file() and not (raw / name).with_suffix("").is_file():
            raise UserError(
                f"data.dir: {raw / name} is missing; {how_to_get(published.__name__, root)}"
            )

    def read() -> tuple[Labelled, Labelled]:
        train_images, train_labels, test_images, test_labels = (
            _read_idx(raw / name, md5) for name, md5 in published.resources
        )
        return Labelled(train_images[..., None], train_labels), Labelled(
            test_images[..., None], test_labels
        )

    names = (
        [f"digit-{label}" for label in range(10)]
        if config.dataset == "mnist"
        else slugs(published.classes)
    )
    return LabelledSource(config, names, range(10), read)


def _read_idx(packed: Path, md5: str) -> Images:
    """Read ``packed``, a .gz file, or its unpacked neighbour, of which no checksum is published."""
    if packed.is_file():
        return parse_idx(gzip.decompress(read_verified(packed, md5)), packed)
    unpacked = packed.with_suffix("")
    try:
        return parse_idx(unpacked.read_bytes(), unpacked)
    except OSError as error:
        raise UserError(f"data.dir: cannot read {unpacked}: {error.strerror or error}") from error


def parse_idx(content: bytes, path: Path) -> Images:
    """Decode an idx file of unsigned bytes: two zeros, type, dimensions, big-endian shape, values.

    Args:
        content: the unpacked file.
        path: where it came from, for the error message.

    Raises:
        UserError: the header is another one, or there are more or fewer values than it says.
    """
    header = 4 + 4 * content[3] if len(content) >= 4 else 4
    if content[:3] != bytes([0, 0, UNSIGNED_BYTE]) or len(content) < header:
        raise UserError(f"data.dir: {path} is not an idx file of unsigned bytes")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    values = np.frombuffer(content, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64):
        raise UserError(
            f"data.dir: {path} is truncated or corrupted: {values.size} bytes for the shape {shape}"
        )
    return values.reshape(shape)
