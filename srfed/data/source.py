"""What all sources of images have in common: how tasks are named, counted and split."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from srfed.config import DataConfig
from srfed.data.images import Images, fit_images
from srfed.errors import UserError
from srfed.paths import user_path

ImagesOrFiles = TypeVar("ImagesOrFiles", Images, list[Path])


class Source(Protocol):
    """A data set that is found but not yet decoded."""

    @property
    def names(self) -> list[str]:
        """The tasks, in order: unique and safe as file names."""
        ...

    def load(self, index: int) -> tuple[Images, Images]:
        """The training and the held-out test images of one task, uint8 N x H x W x C."""
        ...


class Labelled(NamedTuple):
    """One split of a data set that comes in one piece."""

    images: Images
    """N x H x W x C."""
    labels: NDArray[np.integer[Any]]
    """N."""


@dataclass
class LabelledSource:
    """A data set in one piece, whose labels say which image belongs to which task."""

    config: DataConfig
    names: list[str]
    labels: Sequence[int]
    """The label of each task."""
    read: Callable[[], tuple[Labelled, Labelled | None]]
    """Decodes training and test split; None where the data set has no test split."""

    @cached_property
    def _splits(self) -> tuple[Labelled, Labelled | None]:
        return self.read()

    def load(self, index: int) -> tuple[Images, Images]:
        train, test = self._splits
        chosen = split(
            self.config,
            self.names[index],
            train.images[train.labels == self.labels[index]],
            None if test is None else test.images[test.labels == self.labels[index]],
        )
        size, channels = self.config.image_size, self.config.channels
        return fit_images(chosen[0], size, channels), fit_images(chosen[1], size, channels)


def split(
    config: DataConfig, name: str, train: ImagesOrFiles, test: ImagesOrFiles | None
) -> tuple[ImagesOrFiles, ImagesOrFiles]:
    """Choose a task's training and test images; the same rule for every source.

    Where there is no test split, the last ``test_fraction`` (to the nearest image, at least one) in file
    order is held out. Of what remains for training the first ``images_per_task`` are taken.

    Raises:
        UserError: nothing would be left to train or to test on, or ``images_per_task`` is more than there is.
    """
    if not len(train):
        raise UserError(f"data.dir: task {name} has no training images")
    if test is None:
        held_out = max(1, round(len(train) * config.test_fraction))
        if held_out >= len(train):
            raise UserError(
                f"data.test_fraction = {config.test_fraction} leaves nothing to train on of the {len(train)} "
                f"images of task {name}; allowed: more images or a smaller fraction"
            )
        train, test = train[:-held_out], train[-held_out:]
    if not len(test):
        raise UserError(f"data.dir: task {name} has no test images")
    wanted = config.images_per_task
    if wanted is not None and wanted > len(train):
        raise UserError(
            f"data.images_per_task = {wanted} is more than the {len(train)} training images of task {name}; "
            f"allowed: 1 to {len(train)}, or null for all"
        )
    return train[:wanted], test


def slugs(titles: Sequence[str]) -> list[str]:
    """Make task names of titles: lower-case a-z, 0-9 and single hyphens ("T-shirt/top": "t-shirt-top").

    Raises:
        UserError: a title has no letter or digit of these, or two titles become the same name.
    """
    seen: dict[str, str] = {}
    for title in titles:
        ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_title.lower()).strip("-")
        if not slug:
            raise UserError(f"data.dir: no task can be named after {title!r}; use letters a-z or digits")
        if slug in seen:
            raise UserError(f"data.dir: {seen[slug]!r} and {title!r} would both be task {slug}; rename one of them")
        seen[slug] = title
    return list(seen)


def data_path(config: DataConfig, expected: str) -> Path:
    """``data.dir`` as a path that exists.

    Args:
        config: whose ``dir`` is meant.
        expected: what should be there, for the error message.

    Raises:
        UserError: ``data.dir`` is empty or does not exist.
    """
    if not config.dir:
        raise UserError(f"data.dir is not set; data.dataset = {config.dataset} needs {expected}")
    path = user_path(config.dir)
    if not path.exists():
        raise UserError(f"data.dir = {config.dir} does not exist; data.dataset = {config.dataset} needs {expected}")
    return path
