"""What all sources of images have in common: how tasks are named, counted and split."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from srfed.config import DataConfig
from srfed.data.images import Images, fit_images
from srfed.data.mapped import chosen_images
from srfed.data.record import ImageRecord, fingerprints
from srfed.errors import UserError
from srfed.paths import user_path

Pictures = TypeVar("Pictures", Images, list[Any])
"""Images, or what they will be read from."""


class Source(Protocol):
    """A data set that is found but not yet decoded."""

    @property
    def names(self) -> list[str]:
        """The tasks, in order: unique and safe as file names."""
        ...

    def load(self, index: int, known: ImageRecord | None = None) -> tuple[Images, Images]:
        """The training and the held-out test images of one task, uint8 N x H x W x C.

        Where the images' content decides the split, an image that is ``known`` stays on its side.
        """
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
    published: bool = True
    """The file is the same everywhere and for ever, so its order may say what is held out."""

    @cached_property
    def _splits(self) -> tuple[Labelled, Labelled | None]:
        return self.read()

    def load(self, index: int, known: ImageRecord | None = None) -> tuple[Images, Images]:
        train, test = self._splits
        own = chosen_images(train.images, train.labels == self.labels[index])
        held_out = (
            None if test is None else chosen_images(test.images, test.labels == self.labels[index])
        )
        return fit_and_split(
            self.config, self.names[index], own, held_out, known, by_content=not self.published
        )


def fit_and_split(
    config: DataConfig,
    name: str,
    train: Images,
    test: Images | None,
    known: ImageRecord | None,
    *,
    by_content: bool = True,
) -> tuple[Images, Images]:
    """A task's training and test images, brought to the size and channels that are asked for.

    Args:
        config: says how.
        name: the task's, for errors.
        train, test: uint8 N x H x W x C; ``test`` is None where there is no test split, and
        by_content: their content then says what is held out, and not their order.
        known: as for :func:`split_by_content`.

    Raises:
        UserError: as :func:`split`, :func:`split_by_content` and
            :func:`~srfed.data.images.fit_images`.
    """
    size, channels = config.image_size, config.channels
    if test is None and by_content:
        return split_by_content(config, name, fit_images(train, size, channels), known)
    chosen = split(config, name, train, test)
    return fit_images(chosen[0], size, channels), fit_images(chosen[1], size, channels)


def split(
    config: DataConfig, name: str, train: Pictures, test: Pictures | None
) -> tuple[Pictures, Pictures]:
    """Choose a task's training and test images where the owner or a published file says which are
    which.

    Where there is no test split, the last ``test_fraction`` (to the nearest image, at least one) in
    file order is held out. Of what remains for training the first ``images_per_task`` are taken.

    Raises:
        UserError: nothing would be left to train or to test on, or ``images_per_task`` is more than
            there is.
    """
    if not len(train):
        raise UserError(f"data.dir: task {name} has no training images")
    if test is None:
        held_out = max(1, round(len(train) * config.test_fraction))
        if held_out >= len(train):
            raise _nothing_left(config, name, len(train))
        train, test = train[:-held_out], train[-held_out:]
    if not len(test):
        raise UserError(f"data.dir: task {name} has no test images")
    return _first(config, name, train), test


def split_by_content(
    config: DataConfig, name: str, images: Images, known: ImageRecord | None = None
) -> tuple[Images, Images]:
    """Hold images out by what they show, so that none changes its side when others come or go.

    An image's fingerprint, read as a number in [0, 1), is below ``test_fraction`` or not: below, it
    is held out. So ``test_fraction`` is met on average, and equal images are on one side. An image
    that is ``known`` stays where it was. Where either side would have fewer than two images (one,
    of two or three), new images nearest to the limit cross it until it has. Both sides keep the
    order of the images; of the training images the first ``images_per_task`` are taken.

    Args:
        config: says how many.
        name: the task's, for errors.
        images: uint8 N x H x W x C, as the network will see them.
        known: of an earlier time.

    Raises:
        UserError: there are no two different images, or ``images_per_task`` is more than there is.
    """
    names = fingerprints(images)
    sides = {} if known is None else known.held_out
    counts = Counter(names)
    # Known ones stand at the ends of the row, which the limit cannot reach.
    row = sorted(counts, key=lambda one: (_place(one, sides), one))
    lowest = max(1, sum(sides.get(one, False) for one in row))
    highest = len(row) - max(1, sum(not sides.get(one, True) for one in row))
    if lowest > highest:
        raise _nothing_left(config, name, len(names))
    least = min(2, len(names) // 2)
    limit = min(max(sum(_place(one, sides) < config.test_fraction for one in row), lowest), highest)
    while limit < highest and sum(counts[one] for one in row[:limit]) < least:
        limit += 1
    while limit > lowest and sum(counts[one] for one in row[limit:]) < least:
        limit -= 1
    held_out = set(row[:limit])
    chosen = np.array([one in held_out for one in names])
    return _first(config, name, chosen_images(images, ~chosen)), chosen_images(images, chosen)


def _place(fingerprint: str, held_out: Mapping[str, bool]) -> float:
    """An image's place in [0, 1); known ones are before or behind all others."""
    if fingerprint in held_out:
        return -1.0 if held_out[fingerprint] else 1.0
    return int(fingerprint[:13], 16) / 16**13


def _first(config: DataConfig, name: str, train: Pictures) -> Pictures:
    wanted = config.images_per_task
    if wanted is not None and wanted > len(train):
        raise UserError(
            f"data.images_per_task = {wanted} is more than the {len(train)} training images of "
            f"task {name}; allowed: 1 to {len(train)}, or null for all"
        )
    return train[:wanted]


def _nothing_left(config: DataConfig, name: str, count: int) -> UserError:
    return UserError(
        f"data.test_fraction = {config.test_fraction} leaves nothing to train on, or to test on, "
        f"of the {count} images of task {name}; allowed: more images that differ, or a split of "
        "your own"
    )


def slugs(titles: Sequence[str]) -> list[str]:
    """Make task names of titles: lower-case a-z, 0-9 and single hyphens.

    >>> slugs(["T-shirt/top", "Café 3"])
    ['t-shirt-top', 'cafe-3']

    Raises:
        UserError: a title has no letter or digit of these, or two titles become the same name.
    """
    seen: dict[str, str] = {}
    for title in titles:
        ascii_title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_title.lower()).strip("-")
        if not slug:
            raise UserError(
                f"data.dir: no task can be named after {title!r}; use letters a-z or digits"
            )
        if slug in seen:
            raise UserError(
                f"data.dir: {seen[slug]!r} and {title!r} would both be task {slug}; rename one of "
                "them"
            )
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
        raise UserError(
            f"data.dir = {config.dir} does not exist; data.dataset = {config.dataset} needs "
            f"{expected}"
        )
    return path
