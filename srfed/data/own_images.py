"""One owner's own images on the owner's own machine: a folder of pictures, or an .npz file without labels."""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from srfed.config import DataConfig
from srfed.data.folder import image_files, read_files
from srfed.data.images import Images, fit_images
from srfed.data.npz import read_arrays
from srfed.data.source import split
from srfed.data.tasks import Task
from srfed.errors import UserError
from srfed.files import write_bytes

SETTINGS = ("images_per_task", "image_size", "channels", "test_fraction")
"""The settings of ``data`` that decide what an owner's images become."""


def load_own_task(config: DataConfig, path: Path, name: str, cache: Path | None = None) -> Task:
    """Read an owner's images, as ``data.image_size``, ``channels``, ``test_fraction`` and ``images_per_task`` say.

    A folder is searched recursively (:func:`~srfed.data.folder.image_files`); where it holds exactly the
    sub-folders ``train`` and ``test``, these are the splits. An .npz file has ``train_images`` and optionally
    ``test_images``, uint8, N x H x W or N x H x W x C. Without a test split the last ``test_fraction`` is held
    out.

    Args:
        config: the run's data settings; ``dataset`` and ``dir`` mean nothing here.
        path: the folder or the file.
        name: the task's name, which is the client's id.
        cache: folder for a copy of the decoded images, so that the next process need not decode them again;
            the copy is used as long as settings, files, sizes and times of change are the same.

    Returns:
        The task; its index is -1, as no data set gives it a place.

    Raises:
        UserError: there are no images, or too few; one cannot be read; they differ in size.
    """
    try:
        return Task(-1, name, *_load(config, path, name, cache))
    except OSError as error:
        raise UserError(f"data: cannot read {error.filename or path}: {error.strerror or error}") from error


def _load(config: DataConfig, path: Path, name: str, cache: Path | None) -> tuple[Images, Images]:
    if not path.exists():
        raise UserError(f"data: {path} does not exist; name a folder of images or an .npz file")
    if cache is None:
        return _read(config, path, name)
    file = cache / f"images-{_fingerprint(config, path)}.safetensors"
    cached = _from_cache(file)
    if cached is None:
        cached = _read(config, path, name)
        arrays = {"train": np.ascontiguousarray(cached[0]), "test": np.ascontiguousarray(cached[1])}
        write_bytes(file, safetensors.numpy.save(arrays))
        for old in cache.glob("images-*.safetensors"):
            if old != file:
                old.unlink(missing_ok=True)
    return cached


def _read(config: DataConfig, path: Path, name: str) -> tuple[Images, Images]:
    return _read_folder(config, path, name) if path.is_dir() else _read_npz(config, path, name)


def _read_folder(config: DataConfig, folder: Path, name: str) -> tuple[Images, Images]:
    train_folder, test_folder = _split_folders(folder)
    files = image_files(train_folder)
    if not files:
        raise UserError(f"data: {train_folder} holds no images")
    held_out = None if test_folder is None else image_files(test_folder)
    if held_out == []:
        raise UserError(f"data: {test_folder} holds no images")
    train, test = split(config, name, files, held_out)
    images = read_files([*train, *test], config.image_size, config.channels)
    return images[: len(train)], images[len(train) :]


def _split_folders(folder: Path) -> tuple[Path, Path | None]:
    visible = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if visible == {"train", "test"}:
        return folder / "train", folder / "test"
    return folder, None


def _read_npz(config: DataConfig, path: Path, name: str) -> tuple[Images, Images]:
    arrays = read_arrays(path, ["train_images"], optional=["test_images"], key="data")
    for key, values in arrays.items():
        if values.dtype != np.uint8 or values.ndim not in (3, 4) or not len(values):
            raise UserError(
                f"data: {path}: {key} is {values.dtype} {values.shape}; allowed: uint8, N x H x W x C or N x H x W"
            )
    images = {key: values if values.ndim == 4 else values[..., None] for key, values in arrays.items()}
    chosen = split(config, name, images["train_images"], images.get("test_images"))
    train, test = (fit_images(part, config.image_size, config.channels) for part in chosen)
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"data: {path}: train_images {train.shape} and test_images {test.shape} differ in size; "
            "set data.image_size and data.channels"
        )
    return train, test


def _fingerprint(config: DataConfig, path: Path) -> str:
    """What a cached copy depends on: the settings, and each file's place, size and time of change."""
    files = image_files(path) if path.is_dir() else [path]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = [getattr(config, key) for key in SETTINGS]
    return hashlib.sha256(json.dumps([settings, found]).encode()).hexdigest()[:16]


def _from_cache(file: Path) -> tuple[Images, Images] | None:
    """The cached splits; None where there is no sound copy."""
    try:
        arrays = safetensors.numpy.load_file(file)
        return arrays["train"], arrays["test"]
    except (OSError, SafetensorError, KeyError):
        return None
