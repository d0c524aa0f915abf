"""Do samples belong to their tasks? A 3-nearest-neighbour classifier on the pixels of real images
is the judge.

It knows nothing of the feature network or the model. Where it cannot tell the tasks of real images
apart (CIFAR), its verdict on generated ones means nothing; so its accuracy on held-out real images
is always told beside it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from srfed.data import Task
from srfed.data.images import Images

NEIGHBOURS = 3


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
    judge = _train([(task.name, np.concatenate([task.train, task.test])) for task in tasks])
    verdicts = {name: judge.predict(_flat(images)) for name, images in samples.items()}
    return {
        name: {task.name: float((verdict == task.name).mean()) for task in tasks}
        for name, verdict in verdicts.items()
    }


def accuracy_on_real_images(tasks: Sequence[Task]) -> float:
    """The judge's accuracy on the tasks' test images when trained on their training images
    alone.
    """
    judge = _train([(task.name, task.train) for task in tasks])
    right = [judge.predict(_flat(task.test)) == task.name for task in tasks]
    return float(np.concatenate(right).mean())


def _train(classes: Sequence[tuple[str, Images]]) -> KNeighborsClassifier:
    labels = [name for name, images in classes for _ in images]
    return KNeighborsClassifier(NEIGHBOURS).fit(
        _flat(np.concatenate([images for _, images in classes])), labels
    )


def _flat(images: Images) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)
