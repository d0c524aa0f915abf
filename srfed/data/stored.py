"""Tasks given as arrays: looked at, and kept in one .npz file for every process of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srfed.data.images import CHANNELS, check_layout, check_size
from srfed.data.mapped import is_mapped
from srfed.data.source import slugs
from srfed.data.tasks import Task
from srfed.errors import UserError
from srfed.files import written_file


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise UserError unless these can be the tasks of one run: names, types, shapes, numbers."""
    if not tasks:
        raise UserError("tasks is empty; a run needs at least one task")
    names = [task.name for task in tasks]
    for name in names:
        (safe,) = slugs([name])
        if safe != name:
            raise UserError(f"task name {name!r} is impossible; allowed: such as {safe!r}")
        if names.count(name) > 1:
            raise UserError(f"two tasks are called {name!r}; each needs a name of its own")
    for task in tasks:
        for what, images in (("train", task.train), ("test", task.test)):
            where = f"{what} of task {task.name!r}"
            if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
                found = getattr(images, "dtype", type(images).__name__)
                raise UserError(
                    f"{where} is {found} {getattr(images, 'shape', '')}; it must be a numpy array "
                    "of uint8, N x H x W x C"
                )
            check_layout(images, where)
            if images.shape[1:] != task.train.shape[1:]:
                raise UserError(
                    f"{where} has images of {images.shape[1:]}, and train of "
                    f"{task.train.shape[1:]}; a task's must be of one shape"
                )
            if images.shape[-1] not in CHANNELS:
                raise UserError(
                    f"{where} has images of {images.shape[1:]}; allowed: 1 or 3 channels"
                )
            check_size(images.shape[2], images.shape[1], None)
        if len(task.validation):
            raise UserError(
                f"task {task.name!r} has {len(task.validation)} validation images of its own; "
                "allowed: none, data.validation_images sets some of the training images aside"
            )
        if not len(task.train) or not len(task.test):
            raise UserError(
                f"task {task.name!r} has {len(task.train)} training and {len(task.test)} test "
                "images; allowed: at least 1 of each"
            )


def store_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write tasks as the data set ``npz`` reads them (:func:`srfed.data.npz.open_npz`), for the
    owner's eyes only; raises UserError where that cannot be.
    """
    arrays: dict[str, Any] = {"label_names": np.array([task.name for task in tasks])}
    for split in ("train", "test"):
        groups = [getattr(task, split) for task in tasks]
        if len({task.shape for task in tasks}) == 1 and not any(map(is_mapped, groups)):
            arrays[f"{split}_images"] = np.concatenate(groups)
            arrays[f"{split}_labels"] = np.repeat(np.arange(len(tasks)), [len(g) for g in groups])
        else:
            arrays |= {f"{split}_images_{label}": group for label, group in enumerate(groups)}
    # What is mapped is written as it lies, in pieces, to be mapped again.
    save = np.savez if any(map(is_mapped, arrays.values())) else np.savez_compressed
    with written_file(path) as file:
        save(file, **arrays)
