"""What images hold, told where it is next to nothing, before anybody trains on them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from srfed.config import DataConfig
from srfed.data.images import Images
from srfed.data.tasks import Task

NEARLY = 16
"""An image is nearly black whose every value is at most this, nearly white whose every value is as
close to 255.
"""
MOST_LINES = 10
_AT_ONCE = 1024


def describe_contents(config: DataConfig, tasks: Sequence[Task]) -> list[str]:
    """By task, how many images are constant, nearly black or nearly white, and whether all are
    identical, with least and greatest value; no line where none is any of this.
    """
    found = [(task.name, words) for task in tasks if (words := _of(task))]
    lines = [f"images of {name}: {words}" for name, words in found[:MOST_LINES]]
    if len(found) > MOST_LINES:
        lines.append(f"images of {len(found) - MOST_LINES} tasks more are like these")
    if found:
        lines.append(
            "look at such images, as nothing is learned from them: what is transparent lies on "
            f"data.background = {config.background}, and data.intensity decides what becomes "
            "black and white in pictures of more than 8 bits"
        )
    return lines


def _of(task: Task) -> str:
    groups = [group for group in (task.train, task.validation, task.test) if len(group)]
    bounds = [_bounds(group) for group in groups]
    least, greatest = (np.concatenate(side) for side in zip(*bounds, strict=True))
    count, constant = len(least), least == greatest
    kinds = {
        "of one value": constant,
        "nearly black": ~constant & (greatest <= NEARLY),
        "nearly white": ~constant & (least >= 255 - NEARLY),
    }
    words = [
        f"{chosen.sum()} of {count} ({chosen.mean():.0%}) are {kind}"
        for kind, chosen in kinds.items()
        if chosen.any()
    ]
    if count > 1 and all(_repeats(group, groups[0][0]) for group in groups):
        words.append(f"all {count} are identical")
    if not words:
        return ""
    return f"{', '.join(words)}; values from {least.min()} to {greatest.max()} of 0 to 255"


def _bounds(images: Images) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The least and the greatest value of each image."""
    blocks = [images[first : first + _AT_ONCE] for first in range(0, len(images), _AT_ONCE)]
    sides = [(block.min(axis=(1, 2, 3)), block.max(axis=(1, 2, 3))) for block in blocks]
    least, greatest = (np.concatenate(side) for side in zip(*sides, strict=True))
    return least, greatest


def _repeats(images: Images, one: Images) -> bool:
    return all(
        bool((images[first : first + _AT_ONCE] == one).all())
        for first in range(0, len(images), _AT_ONCE)
    )
