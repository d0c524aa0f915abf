"""One owner's own images on the owner's own machine: a folder of pictures, or an .npz file without
labels.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from srfed.config import DataConfig
from srfed.data.folder import describe_listings, describe_pictures, list_images, load_listing
from srfed.data.images import Images, check_layout
from srfed.data.npz import read_arrays
from srfed.data.record import RECORD_FILE, ImageRecord, read_records, write_records
from srfed.data.source import fit_and_split
from srfed.data.tasks import Task
from srfed.data.validation import set_aside
from srfed.errors import UserError
from srfed.files import held, remove_temporary_files, stamp, write_bytes

SETTINGS = ("images_per_task", "image_size", "channels", "intensity", "test_fraction")
LATER = ("validation_images", "background", "pages")
"""The settings of ``data`` that decide what an owner's images become; of :data:`LATER` there are
records from before there was the setting, so a default is not told.
"""
Write = Callable[[], object]
"""Writes something into a store."""
READING = 2
"""Counts up when the same file becomes other images than before."""


def load_own_task(
    config: DataConfig,
    path: Path,
    name: str,
    store: Path | None = None,
    *,
    keep: bool = True,
    later: Callable[[Write], object] | None = None,
) -> Task:
    """Read an owner's images, as the settings of :data:`SETTINGS` and :data:`LATER` say.

    A folder is read as :func:`~srfed.data.folder.list_images` says: its own ``train`` and ``test``
    are the splits, where it has them. An .npz file has ``train_images`` and optionally
    ``test_images``, uint8, N x H x W or N x H x W x C. Without a split of the owner's, the images'
    content decides (:func:`~srfed.data.source.split_by_content`).

    Args:
        config: the run's data settings; ``dataset`` and ``dir`` mean nothing here.
        path: the folder or the file.
        name: the task's name, which is the client's id.
        store: the site's own folder. It keeps the record of the images that were first met under
            these settings, with which they are compared ever after; and a copy of the decoded
            images, so that the next process need not decode them again, which is used as long as
            settings, files, sizes and times of change are the same. None keeps and compares
            nothing.
        keep: False compares with what the store has on record, and writes nothing.
        later: takes each of what is to be written, in order, for whoever writes it when it is known
            that it may be; None writes at once.

    Returns:
        The task; its index is -1, as no data set gives it a place.

    Raises:
        UserError: there are no images, or too few; one cannot be read; they differ in size; they
            are not those on record.
    """
    records = {} if store is None else read_records(store / RECORD_FILE)
    known, writes = records.get(_key(config, name)), later or _at_once
    task = _load(config, path, name, known, store if keep else None, writes)
    now = ImageRecord.of(task)
    if known is not None and (changes := known.differences(now)):
        raise UserError(
            f"the images of {path} are not those on record for {name} ({changes}); put them back, "
            "or accept the change with: python -m srfed.deploy agree"
        )
    if known is None and store is not None and keep:
        file, key = store / RECORD_FILE, _key(config, name)
        # Read again: others may have been put on record until it is written.
        writes(lambda: write_records(file, read_records(file) | {key: now}))
    return task


def _at_once(write: Write) -> None:
    write()


def current_images(config: DataConfig, path: Path, name: str, store: Path) -> tuple[Task, str]:
    """An owner's images as they are now, for the owner to accept; images that are known already
    stay on their side.

    Args:
        config, path, name, store: as :func:`load_own_task`; nothing is written.

    Returns:
        The task, and in words what has changed since the last record; empty where nothing has, or
        there was none.

    Raises:
        UserError: as :func:`load_own_task`, but for changes.
    """
    known = recorded_images(config, name, store)
    task = _load(config, path, name, known, None)
    return task, "" if known is None else known.differences(ImageRecord.of(task))


def accept_images(config: DataConfig, path: Path, name: str, store: Path) -> str:
    """Put the images that are there now on record, for the owner who has seen what changed.

    Args, returns and raises as :func:`current_images`; besides, the record may not be written.
    """
    task, changes = current_images(config, path, name, store)
    now, records = ImageRecord.of(task), read_records(store / RECORD_FILE)
    if records.get(_key(config, name)) != now:
        write_records(store / RECORD_FILE, records | {_key(config, name): now})
    return changes


def recorded_images(config: DataConfig, name: str, store: Path) -> ImageRecord | None:
    """The images that a site has on record under these settings; None where it has none.

    Raises:
        UserError: the record cannot be read, is damaged, or of another format.
    """
    return read_records(store / RECORD_FILE).get(_key(config, name))


def describe_own_images(config: DataConfig, path: Path) -> list[str]:
    """What is taken of an owner's folder, what is passed over and why, and what deep pictures
    become: a few lines.

    Raises:
        UserError: as :func:`load_own_task`.
    """
    if not path.is_dir():
        return []
    listing = list_images(path)
    return [*describe_listings([listing]), *describe_pictures(listing.files, config)]


def _load(
    config: DataConfig,
    path: Path,
    name: str,
    known: ImageRecord | None,
    cache: Path | None,
    writes: Callable[[Write], object] = _at_once,
) -> Task:
    try:
        train, test = _decoded(config, path, name, known, cache, writes)
    except OSError as error:
        raise UserError(
            f"data: cannot read {error.filename or path}: {error.strerror or error}"
        ) from error
    train, validation = set_aside(config, name, train, known)
    return Task(name, train, test, -1, validation)


def _decoded(
    config: DataConfig,
    path: Path,
    name: str,
    known: ImageRecord | None,
    cache: Path | None,
    writes: Callable[[Write], object],
) -> tuple[Images, Images]:
    if not path.exists():
        raise UserError(f"data: {path} does not exist; name a folder of images or an .npz file")
    if cache is None:
        return _read(config, path, name, known)
    file = cache / f"images-{_fingerprint(config, path)}.safetensors"
    cached = _from_cache(file)
    if cached is not None:
        return cached
    train, test = _read(config, path, name, known)
    writes(lambda: _write_cache(file, train, test))
    return train, test


def _write_cache(file: Path, train: Images, test: Images) -> None:
    """Keep decoded images, and drop those that were kept before."""
    cache = file.parent
    with held(cache / "lock", wait=True):
        # Of a process that was killed while it wrote as much again.
        remove_temporary_files(cache, r"images-.*\.safetensors")
        arrays = {"train": np.ascontiguousarray(train), "test": np.ascontiguousarray(test)}
        write_bytes(file, safetensors.numpy.save(arrays))
        for old in cache.glob("images-*.safetensors"):
            if old != file:
                old.unlink(missing_ok=True)


def _read(
    config: DataConfig, path: Path, name: str, known: ImageRecord | None
) -> tuple[Images, Images]:
    if not path.is_dir():
        return _read_npz(config, path, name, known)
    return load_listing(config, name, list_images(path), known)


def _read_npz(
    config: DataConfig, path: Path, name: str, known: ImageRecord | None
) -> tuple[Images, Images]:
    arrays = read_arrays(path, ["train_images"], optional=["test_images"], key="data")
    for key, values in arrays.items():
        if values.dtype != np.uint8 or values.ndim not in (3, 4) or not len(values):
            raise UserError(
                f"data: {path}: {key} is {values.dtype} {values.shape}; allowed: uint8, N x H x W "
                "x C or N x H x W"
            )
    images = {
        key: values if values.ndim == 4 else values[..., None] for key, values in arrays.items()
    }
    for key, values in images.items():
        check_layout(values, f"data: {path}: {key}")
    train, test = fit_and_split(
        config, name, images["train_images"], images.get("test_images"), known
    )
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"data: {path}: train_images {train.shape} and test_images {test.shape} differ in "
            "size; set data.image_size and data.channels"
        )
    return train, test


def _key(config: DataConfig, name: str) -> str:
    """Under what a record stands: the same images in another shape are other images."""
    usual = DataConfig()
    settings = [*SETTINGS, *(key for key in LATER if getattr(config, key) != getattr(usual, key))]
    return ", ".join([name, *(f"{key} {json.dumps(getattr(config, key))}" for key in settings)])


def _fingerprint(config: DataConfig, path: Path) -> str:
    """What a cached copy depends on: the settings, and each file's place and stamp."""
    files = list_images(path).files if path.is_dir() else [path]
    found = [(str(file), stamp(file)) for file in files]
    settings = [READING, *(getattr(config, key) for key in (*SETTINGS, "background", "pages"))]
    return hashlib.sha256(json.dumps([settings, found]).encode()).hexdigest()[:16]


def _from_cache(file: Path) -> tuple[Images, Images] | None:
    """The cached splits; None where there is no sound copy."""
    try:
        arrays = safetensors.numpy.load_file(file)
        return arrays["train"], arrays["test"]
    except (OSError, SafetensorError, KeyError):
        return None
