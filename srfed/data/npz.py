"""Images and labels in one .npz file, read without unpickling anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srfed.config import DataConfig
from srfed.data.images import Images, check_layout
from srfed.data.mapped import map_member
from srfed.data.record import ImageRecord
from srfed.data.source import (
    Labelled,
    LabelledSource,
    Source,
    data_path,
    fit_and_split,
    slugs,
)
from srfed.errors import UserError

Arrays = dict[str, NDArray[Any]]


def open_npz(config: DataConfig) -> Source:
    """One task for each label that occurs, in the labels' order.

    ``data.dir`` is a file with ``train_images`` (uint8, N x H x W x C or N x H x W) and
    ``train_labels`` (whole numbers, N); optionally ``test_images`` and ``test_labels``; optionally
    ``label_names``, where entry k names label k. Without names label k is task "class-k".

    Where tasks differ in the shape of their images, the file has ``label_names`` and, for entry k,
    ``train_images_k`` and optionally ``test_images_k``, and no labels.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    path = data_path(config, "an .npz file with train_images and train_labels")
    names_alone = read_arrays(path, [], optional=["train_images_0", "label_names"])
    if "train_images_0" in names_alone:
        return _open_separate(config, path, names_alone)
    arrays = read_arrays(path, ["train_labels"], optional=["label_names"])
    _check_labels(path, "train_labels", arrays["train_labels"])
    labels = [int(label) for label in np.unique(arrays["train_labels"])]
    if "label_names" in arrays:
        titles = [str(title) for title in arrays["label_names"].ravel()]
        unnamed = [label for label in labels if not 0 <= label < len(titles)]
        if unnamed:
            raise UserError(
                f"data.dir: {path}: label_names has {len(titles)} entries, none for label "
                f"{unnamed[0]}"
            )
        names = slugs([titles[label] for label in labels])
    else:
        names = [f"class-{label}" for label in labels]

    def read() -> tuple[Labelled, Labelled | None]:
        arrays = read_arrays(
            path, ["train_images", "train_labels"], optional=["test_images", "test_labels"]
        )
        if ("test_images" in arrays) != ("test_labels" in arrays):
            raise UserError(
                f"data.dir: {path} has one of test_images and test_labels; allowed: both or neither"
            )
        train = _labelled(path, arrays, "train")
        test = _labelled(path, arrays, "test") if "test_images" in arrays else None
        if test and test.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"data.dir: {path}: train_images {train.images.shape} and test_images "
                f"{test.images.shape} are of different size"
            )
        return train, test

    return LabelledSource(config, names, labels, read, published=False)


def _open_separate(config: DataConfig, path: Path, arrays: Arrays) -> "_Separate":
    if "label_names" not in arrays:
        raise UserError(f"data.dir: {path} has train_images_0 and no label_names")
    names = slugs([str(title) for title in arrays["label_names"].ravel()])
    return _Separate(config, path, names)


@dataclass
class _Separate:
    """Tasks each of whose images are arrays of their own."""

    config: DataConfig
    path: Path
    names: list[str]

    def load(self, index: int, known: ImageRecord | None = None) -> tuple[Images, Images]:
        train, test = (f"{split}_images_{index}" for split in ("train", "test"))
        arrays = read_arrays(self.path, [train], optional=[test])
        found = {name: _images(self.path, name, images) for name, images in arrays.items()}
        own = fit_and_split(self.config, self.names[index], found[train], found.get(test), known)
        if own[0].shape[1:] != own[1].shape[1:]:
            raise UserError(
                f"data.dir: {self.path}: {train} {own[0].shape} and {test} {own[1].shape} are of "
                "different size"
            )
        return own


def read_arrays(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), key: str = "data.dir"
) -> Arrays:
    """Read the named arrays of an .npz file, and no others; ``key`` is the setting that errors
    name.

    Raises:
        UserError: the file cannot be read, is damaged, lacks a required array, or holds Python
            objects.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [name for name in required if name not in stored]
            if missing:
                raise UserError(
                    f"{key}: {path} has no array {missing[0]}; it has {', '.join(stored)}"
                )
            named = [name for name in (*required, *optional) if name in stored]
            mapped = {name: map_member(path, name) for name in named}
            return {
                name: stored[name] if whole is None else whole for name, whole in mapped.items()
            }
    except UserError:
        raise
    except Exception as error:
        # No archive at all, a lone .npy array, a truncated archive and pickled objects: each raises
        # its own.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}: {path} is not a sound .npz file of plain arrays: {reason}"
        ) from error


def _labelled(path: Path, arrays: Arrays, split: str) -> Labelled:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    _check_labels(path, f"{split}_labels", labels)
    images = _images(path, f"{split}_images", images)
    if len(images) != len(labels):
        raise UserError(
            f"data.dir: {path} has {len(images)} {split}_images but {len(labels)} {split}_labels"
        )
    return Labelled(images, labels)


def _images(path: Path, name: str, images: NDArray[Any]) -> Images:
    """N x H x W x C; raises UserError where an array is none of images."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"data.dir: {path}: {name} is {images.dtype} {images.shape}; allowed: uint8, N x H x W "
            "x C or N x H x W"
        )
    images = images if images.ndim == 4 else images[..., None]
    check_layout(images, f"data.dir: {path}: {name}")
    return images


def _check_labels(path: Path, name: str, labels: NDArray[Any]) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
        raise UserError(
            f"data.dir: {path}: {name} is {labels.dtype} {labels.shape}; allowed: whole numbers, N"
        )
