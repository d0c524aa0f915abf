"""Do samples belong to their tasks? A 3-nearest-neighbour classifier on the pixels of real images
is the judge.

It knows nothing of the feature network or the model. Where it cannot tell the tasks of real images
apart (CIFAR), its verdict on generated ones means nothing; so its accuracy on held-out real images
is always told beside it.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from srfed.data import Task
from srfed.data.images import Images, fit_images
from srfed.records import Shape

NEIGHBOURS = 3
MOST_IMAGES = 500
"""Of each task, that a run's evaluations judge by: the first."""
BLOCK = 1024
"""Images whose distances to as many others are taken at a time."""


class Recogniser:
    """Says in every evaluation of a run whose the samples are, by the same real images.

    Args:
        tasks: whose images the server has; with fewer than two there is nothing to tell apart.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._shares_of_real: dict[str, float] = {}

    def accuracy(self, names: Collection[str]) -> float | None:
        """The share of these tasks' test images that is given to their own task, of all; None where
        there is nothing to tell.
        """
        if self._judge is None:
            return None
        images = {
            task.name: task.test[:MOST_IMAGES]
            for task in self._tasks
            if task.name in names and len(task.test)
        }
        new = {name: some for name, some in images.items() if name not in self._shares_of_real}
        self._shares_of_real |= self.shares(new)
        right = sum(self._shares_of_real[name] * len(some) for name, some in images.items())
        return right / sum(map(len, images.values())) if images else None

    def shares(self, samples: Mapping[str, Images]) -> dict[str, float]:
        """The share of each task's samples, uint8 N x H x W x C, that is given to that task."""
        if self._judge is None:
            return {}
        known = {task.name for task in self._tasks}
        asked = {name: some for name, some in samples.items() if name in known and len(some)}
        verdicts = self._judge.verdicts(asked)
        return {name: float((verdict == name).mean()) for name, verdict in verdicts.items()}

    @cached_property
    def _judge(self) -> "_Judge | None":
        if len(self._tasks) < 2 or sum(len(task.train) for task in self._tasks) < NEIGHBOURS:
            return None
        classes = [(task.name, task.train[:MOST_IMAGES]) for task in self._tasks]
        return _Judge(classes, _common_shape(self._tasks))


def class_agreement(tasks: Sequence[Task], samples: Mapping[str, Images]) -> dict[str, float]:
    """Share of each task's samples that the judge, trained on all real images, gives to that
    task.
    """
    return {name: shares[name] for name, shares in judged_as(tasks, samples).items()}


def judged_as(tasks: Sequence[Task], samples: Mapping[str, Images]) -> dict[str, dict[str, float]]:
    """What share of each task's samples the judge, trained on all real images, gives to which task.

    Args:
        tasks: the judge's classes.
        samples: uint8 N x H x W x C by task, N at least 1.

    Returns:
        For each entry of ``samples`` the share by name of every task; each entry's shares add up to
        1.
    """
    classes = [(task.name, np.concatenate([task.train, task.test])) for task in tasks]
    return {
        name: {task.name: float((verdict == task.name).mean()) for task in tasks}
        for name, verdict in _Judge(classes, _common_shape(tasks)).verdicts(samples).items()
    }


def accuracy_on_real_images(tasks: Sequence[Task]) -> float:
    """The judge's accuracy on the tasks' test images when trained on their training images
    alone.
    """
    judge = _Judge([(task.name, task.train) for task in tasks], _common_shape(tasks))
    verdicts = judge.verdicts({task.name: task.test for task in tasks})
    return float(np.concatenate([found == name for name, found in verdicts.items()]).mean())


def _common_shape(tasks: Sequence[Task]) -> Shape | None:
    """What images that differ in shape are brought to before they are compared: the least side,
    and grey where some are. A judge that saw their shapes would know the tasks by these.
    """
    shapes = {task.shape for task in tasks}
    if len(shapes) == 1:
        return None
    side = min(min(shape[:2]) for shape in shapes)
    return side, side, min(shape[2] for shape in shapes)


class _Judge:
    """Gives images to the class of most of their nearest neighbours; of classes with as many, to
    the first by name.

    Args:
        classes: names and their images.
        shape: what images are brought to, if any.
    """

    def __init__(self, classes: Sequence[tuple[str, Images]], shape: Shape | None) -> None:
        self._shape = shape
        names = [name for name, images in classes for _ in images]
        self._names, self._class_of = np.unique(names, return_inverse=True)
        self._known = np.concatenate([_flat(images, shape) for _, images in classes])

    def verdicts(self, samples: Mapping[str, Images]) -> dict[str, NDArray[np.str_]]:
        """The names that each entry's images are given."""
        if not any(map(len, samples.values())):
            return {name: np.empty(0, np.str_) for name in samples}
        # All at once: a search for each of ten thousand tasks would take longer than the searching.
        flat = np.concatenate([_flat(images, self._shape) for images in samples.values()])
        found = nearest(flat, self._known)
        least, middle, most = np.sort(self._class_of[found], axis=1).T
        verdicts = self._names[np.where(middle == most, middle, least)]
        borders = np.cumsum([len(images) for images in samples.values()])[:-1]
        return dict(zip(samples, np.split(verdicts, borders), strict=True))


def _flat(images: Images, shape: Shape | None) -> np.ndarray:
    if shape is not None:
        images = fit_images(images, shape[0], 1 if shape[2] == 1 else None)
    return images.reshape(len(images), -1)


def nearest(queries: Images, references: Images) -> NDArray[np.int64]:
    """Indices of the three references that are nearest to each query, the nearest first, and of
    equally near ones the first; by brute force in blocks of bounded memory.

    Args:
        queries: uint8 N x D; sums of whole grey levels are exact in float64.
        references: uint8 M x D, M at least 3.

    Returns:
        int64 N x 3.
    """
    parts = [
        _nearest_of_block(queries[first : first + BLOCK].astype(np.float64), references)
        for first in range(0, len(queries), BLOCK)
    ]
    return np.concatenate(parts)


def _nearest_of_block(block: NDArray[np.float64], references: Images) -> NDArray[np.int64]:
    rows = np.arange(len(block))[:, None]
    best = np.empty((len(block), 0))
    indices = np.empty((len(block), 0), np.int64)
    for first in range(0, len(references), BLOCK):
        others = references[first : first + BLOCK].astype(np.float64)
        # |x|² is the same for every reference.
        squared = np.square(others).sum(axis=1) - 2 * (block @ others.T)
        for _ in range(min(NEIGHBOURS, len(others))):
            place = squared.argmin(axis=1)[:, None]
            best = np.concatenate([best, squared[rows, place]], axis=1)
            indices = np.concatenate([indices, place + first], axis=1)
            squared[rows, place] = np.inf
        order = best.argsort(axis=1, kind="stable")[:, :NEIGHBOURS]
        best, indices = best[rows, order], indices[rows, order]
    return indices
