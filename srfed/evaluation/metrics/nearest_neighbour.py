"""Do samples belong to their tasks? A 3-nearest-neighbour classifier on the pixels of real images
is the judge.

It knows nothing of the feature network or the model. Where it cannot tell the tasks of real images
apart (CIFAR), its verdict on generated ones means nothing; so its accuracy on held-out real images
is always told beside it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from srfed.data import Task
from srfed.data.images import Images, fit_images
from srfed.records import Shape

if TYPE_CHECKING:
    from sklearn.neighbors import KNeighborsClassifier

NEIGHBOURS = 3
MOST_IMAGES = 500
"""Of each task, that a run's evaluations judge by: the first."""


class Recogniser:
    """Says in every evaluation of a run whose the samples are, by the same real images.

    Args:
        tasks: whose images the server has; with fewer than two there is nothing to tell apart.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    @cached_property
    def accuracy(self) -> float | None:
        """The share of the tasks' test images that is given to their own task; None where there is
        nothing to tell.
        """
        if self._judge is None:
            return None
        images = {task.name: task.test[:MOST_IMAGES] for task in self._tasks if len(task.test)}
        right = sum(share * len(images[name]) for name, share in self.shares(images).items())
        return right / sum(map(len, images.values())) if images else None

    def shares(self, samples: Mapping[str, Images]) -> dict[str, float]:
        """The share of each task's samples, uint8 N x H x W x C, that is given to that task."""
        if self._judge is None:
            return {}
        known = {task.name for task in self._tasks}
        return {
            name: float((self._judge.predict(_flat(images, self._shape)) == name).mean())
            for name, images in samples.items()
            if name in known and len(images)
        }

    @cached_property
    def _shape(self) -> Shape | None:
        return _common_shape(self._tasks)

    @cached_property
    def _judge(self) -> "KNeighborsClassifier | None":
        if len(self._tasks) < 2 or sum(len(task.train) for task in self._tasks) < NEIGHBOURS:
            return None
        classes = [(task.name, task.train[:MOST_IMAGES]) for task in self._tasks]
        return _train(classes, self._shape)


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
    shape = _common_shape(tasks)
    judge = _train([(task.name, np.concatenate([task.train, task.test])) for task in tasks], shape)
    verdicts = {name: judge.predict(_flat(images, shape)) for name, images in samples.items()}
    return {
        name: {task.name: float((verdict == task.name).mean()) for task in tasks}
        for name, verdict in verdicts.items()
    }


def accuracy_on_real_images(tasks: Sequence[Task]) -> float:
    """The judge's accuracy on the tasks' test images when trained on their training images
    alone.
    """
    shape = _common_shape(tasks)
    judge = _train([(task.name, task.train) for task in tasks], shape)
    right = [judge.predict(_flat(task.test, shape)) == task.name for task in tasks]
    return float(np.concatenate(right).mean())


def _common_shape(tasks: Sequence[Task]) -> Shape | None:
    """What images that differ in shape are brought to before they are compared: the least side,
    and grey where some are. A judge that saw their shapes would know the tasks by these.
    """
    shapes = {task.shape for task in tasks}
    if len(shapes) == 1:
        return None
    side = min(min(shape[:2]) for shape in shapes)
    return side, side, min(shape[2] for shape in shapes)


def _train(classes: Sequence[tuple[str, Images]], shape: Shape | None) -> "KNeighborsClassifier":
    # Imported by who judges: it takes a quarter of a run's start.
    from sklearn.neighbors import KNeighborsClassifier

    labels = [name for name, images in classes for _ in images]
    return KNeighborsClassifier(NEIGHBOURS).fit(
        np.concatenate([_flat(images, shape) for _, images in classes]), labels
    )


def _flat(images: Images, shape: Shape | None) -> np.ndarray:
    if shape is not None:
        images = fit_images(images, shape[0], 1 if shape[2] == 1 else None)
    return images.reshape(len(images), -1).astype(np.float32)
