"""Images made here, their files, and which of them are held out."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from srfed.config import DataConfig


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def held_out(images: np.ndarray, fraction: float) -> np.ndarray:
    """Which images (uint8 N x H x W x C) their content holds out, as docs/data.md words the
    rule.
    """
    names = [
        hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() for image in images
    ]
    return np.array([int(name[:13], 16) < fraction * 16**13 for name in names])


def folder(root: Path, **options: Any) -> DataConfig:
    return DataConfig(dataset="folder", dir=str(root), **options)
