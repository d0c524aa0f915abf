"""Folders of image files: one sub-folder for each task, pictures of any size and mode inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from srfed.config import DataConfig
from srfed.data.images import Images, fit_image
from srfed.data.source import data_path, slugs, split
from srfed.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass
class FolderSource:
    """Task folders found under ``data.dir``; only the loaded task's files are opened."""

    config: DataConfig
    names: list[str]
    folders: list[tuple[Path, Path | None]]
    """Each task's folder of training images and, where there is one, of test images."""

    def load(self, index: int) -> tuple[Images, Images]:
        train_folder, test_folder = self.folders[index]
        train, test = split(
            self.config,
            self.names[index],
            image_files(train_folder),
            None if test_folder is None else image_files(test_folder),
        )
        images = read_files([*train, *test], self.config.image_size, self.config.channels)
        return images[: len(train)], images[len(train) :]


def open_folder(config: DataConfig) -> FolderSource:
    """One task for each sub-folder, in the order of their names.

    Where ``data.dir`` holds exactly the folders ``train`` and ``test``, the task folders are inside these.
    Otherwise the last ``test_fraction`` of each task's files, in the order of their paths, is held out.

    Raises:
        UserError: there are no task folders, ``train`` and ``test`` hold different ones, or names collide.
    """
    root = data_path(config, "a folder with one sub-folder for each task")
    tasks = _sub_folders(root)
    if {"train", "test"} <= set(tasks):
        if len(tasks) > 2:
            others = ", ".join(sorted(set(tasks) - {"train", "test"}))
            raise UserError(f"data.dir: {root} holds train, test and {others}; allowed: only train and test, or tasks")
        train, test = _sub_folders(tasks["train"]), _sub_folders(tasks["test"])
        unpaired = sorted(set(train) ^ set(test))
        if unpaired:
            raise UserError(f"data.dir: task {unpaired[0]} is not in both {tasks['train']} and {tasks['test']}")
        return FolderSource(config, slugs(list(train)), [(train[name], test[name]) for name in train])
    return FolderSource(config, slugs(list(tasks)), [(folder, None) for folder in tasks.values()])


def read_images(folder: Path, size: int | None, channels: Literal[1, 3] | None) -> Images:
    """Read every image in one folder and the folders inside it, in the order of their paths.

    Args:
        folder: holds png, jpg, jpeg, bmp, webp, tif or tiff files; other and hidden files are passed over.
        size: as in :func:`~srfed.data.images.fit_image`.
        channels: likewise.

    Returns:
        uint8, N x H x W x C.

    Raises:
        UserError: there is no image, one cannot be read, or they differ in size or channels after fitting.
    """
    files = image_files(folder)
    if not files:
        raise UserError(f"{folder} holds no images; allowed: {', '.join(sorted(SUFFIXES))}")
    return read_files(files, size, channels)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and the folders inside it, in the order of their paths, none opened."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _sub_folders(folder: Path) -> dict[str, Path]:
    try:
        found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."}
    except OSError as error:
        raise UserError(f"data.dir: cannot list {folder}: {error.strerror or error}") from error
    if not found:
        raise UserError(f"data.dir: {folder} has no task folders; put each task's images into a folder of its own")
    return found


def read_files(files: Sequence[Path], size: int | None, channels: Literal[1, 3] | None) -> Images:
    """Read image files, in the given order, at least one; as :func:`read_images`."""
    first = _read_file(files[0], size, channels)
    images = np.empty((len(files), *first.shape), np.uint8)
    for position, file in enumerate(files):
        image = _read_file(file, size, channels) if position else first
        if image.shape[:2] != first.shape[:2]:
            raise UserError(
                f"images differ in size: {files[0]} is {first.shape[1]} x {first.shape[0]} px, {file} is "
                f"{image.shape[1]} x {image.shape[0]} px; set data.image_size"
            )
        if image.shape != first.shape:
            raise UserError(
                f"grey and colour images are mixed: {files[0]} has {first.shape[2]} channels, {file} has "
                f"{image.shape[2]}; set data.channels to 1 or 3"
            )
        images[position] = image
    return images


def _read_file(file: Path, size: int | None, channels: Literal[1, 3] | None) -> Images:
    try:
        with Image.open(file) as image:
            return fit_image(image, size, channels)
    except Exception as error:
        # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and others for damaged files.
        raise UserError(f"cannot read image {file}: {' '.join(str(error).split())}") from error
