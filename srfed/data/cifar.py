"""CIFAR-10 by class and CIFAR-100 by superclass, from the published archives or a compact .npz."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srfed.config import DataConfig
from srfed.data.npz import read_arrays
from srfed.data.source import Labelled, LabelledSource, data_path, slugs
from srfed.data.verified import how_to_get, read_verified
from srfed.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Where the labels stand: CIFAR-100's tasks are its 20 superclasses ("coarse" labels)."""

    published: str
    """Name of the data set in torchvision."""
    labels: str
    label_names: str
    compact: str
    """The .npz file and, below, its arrays."""
    compact_train: str
    compact_test: str
    compact_names: str


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR10",
        "labels",
        "label_names",
        "cifar10_500.npz",
        "train_labels",
        "test_labels",
        "label_names",
    ),
    "cifar100": Layout(
        "CIFAR100",
        "coarse_labels",
        "coarse_label_names",
        "cifar100_500.npz",
        "train_coarse",
        "test_coarse",
        "coarse_names",
    ),
}


def open_cifar(config: DataConfig) -> LabelledSource:
    """Ten tasks, or twenty of CIFAR-100; training and test images are those of the official splits.

    ``data.dir`` holds the unpacked archive (``cifar-10-batches-py`` or ``cifar-100-python``), which
    is taken where it exists, or ``cifar10_500.npz`` or ``cifar100_500.npz``. The latter has 100
    images of each of the 100 classes, so the first 500 of a superclass are other images than in the
    archive.

    Raises:
        UserError: neither is there, or a file is not what was published.
    """
    from torchvision import datasets

    layout = LAYOUTS[config.dataset]
    published = getattr(datasets, layout.published)
    root = data_path(config, f"the folder that holds {published.base_folder} or {layout.compact}")
    archive, compact = root / published.base_folder, root / layout.compact
    if archive.is_dir():
        return _open_archive(config, layout, published, archive)
    if compact.is_file():
        return _open_compact(config, layout, compact)
    raise UserError(
        f"data.dir: neither {archive} nor {compact} is there; {how_to_get(layout.published, root)}"
    )


def _open_archive(
    config: DataConfig, layout: Layout, published: Any, archive: Path
) -> LabelledSource:
    def unpickle(name: str, md5: str) -> dict[str, Any]:
        # A pickle can run any program, so nothing but the published bytes is ever unpickled.
        entry: dict[str, Any] = pickle.loads(read_verified(archive / name, md5), encoding="latin1")
        return entry

    def read_split(files: list[tuple[str, str]]) -> Labelled:
        batches = [unpickle(name, md5) for name, md5 in files]
        planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[layout.labels] for batch in batches])
        return Labelled(planes.transpose(0, 2, 3, 1), labels)

    names = slugs(unpickle(published.meta["filename"], published.meta["md5"])[layout.label_names])
    return LabelledSource(
        config,
        names,
        range(len(names)),
        lambda: (read_split(published.train_list), read_split(published.test_list)),
    )


def _open_compact(config: DataConfig, layout: Layout, path: Path) -> LabelledSource:
    def read() -> tuple[Labelled, Labelled]:
        arrays = read_arrays(
            path, ["train_images", layout.compact_train, "test_images", layout.compact_test]
        )
        return (
            Labelled(arrays["train_images"], arrays[layout.compact_train]),
            Labelled(arrays["test_images"], arrays[layout.compact_test]),
        )

    names = slugs(read_arrays(path, [layout.compact_names])[layout.compact_names].tolist())
    return LabelledSource(config, names, range(len(names)), read)
