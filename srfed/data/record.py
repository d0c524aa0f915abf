"""Which images a task had, and on which side: kept beside what was trained on them, so that a
change is noticed.

images.json     {"format": 1, "records": {key: {"train": [...], "test": [...]}}}

and "validation" beside these, where images were set aside.

A run's folder has a record for each of its tasks, by name. A site's store has one for each set of
settings that its images were brought into shape with.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from srfed.data.images import Images
from srfed.errors import DamagedError
from srfed.files import exists, read_json, write_json

if TYPE_CHECKING:
    from srfed.data.tasks import Task

RECORD_FILE = "images.json"
DIGITS = 32
"""Hexadecimal digits of a fingerprint."""


def fingerprints(images: Images) -> tuple[str, ...]:
    """Name each image (uint8 N x H x W x C) by its content: SHA-256 over its shape and pixels, the
    first 128 bits.
    """
    shape = repr(images.shape[1:]).encode()
    return tuple(
        hashlib.sha256(shape + np.ascontiguousarray(image).tobytes()).hexdigest()[:DIGITS]
        for image in images
    )


@dataclass(frozen=True)
class ImageRecord:
    """The images of one task as fingerprints.

    Attributes:
        train: of the training images, in the order in which they are used.
        test: of the held-out images, likewise.
        validation: of the training images that are set aside, likewise.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    validation: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: "Task") -> Self:
        """The record of a task as it was loaded."""
        return cls(*map(fingerprints, (task.train, task.test, task.validation)))

    @property
    def held_out(self) -> dict[str, bool]:
        """The side of each image; one that is on both counts as trained on, and so does one that is
        set aside.
        """
        kept = dict.fromkeys((*self.train, *self.validation), False)
        return {**dict.fromkeys(self.test, True), **kept}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all of it, hexadecimal."""
        aside = ["", *self.validation] if self.validation else []
        names = [*self.train, "", *self.test, *aside]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def differences(self, now: "ImageRecord") -> str:
        """What has become of these images, in words with counts; empty where nothing has.

        An image that is there twice counts twice.
        """
        more, less = (
            {
                "training": Counter(new.train) - Counter(old.train),
                "tests": Counter(new.test) - Counter(old.test),
                "validation": Counter(new.validation) - Counter(old.validation),
            }
            for new, old in ((now, self), (self, now))
        )
        words = []
        for source, target in permutations(more, 2):
            moved = less[source] & more[target]
            less[source], more[target] = less[source] - moved, more[target] - moved
            words.append((moved.total(), f"moved from {source} to {target}"))
        words += [(more[side].total(), f"new for {side}") for side in more]
        words += [(less[side].total(), f"gone from {side}") for side in less]
        told = ", ".join(f"{count} {what}" for count, what in words if count)
        return told or ("" if self == now else "the same ones in another order")


def read_records(path: Path) -> dict[str, ImageRecord]:
    """The records of a file, by key; none where there is no file.

    Raises:
        UserError: the file cannot be read, is damaged, or of another format.
    """
    if not exists(path):
        return {}
    content = read_json(path, "records")
    try:
        return {key: _record(entry) for key, entry in content["records"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: it is no record of images") from error


def write_records(path: Path, records: Mapping[str, ImageRecord]) -> None:
    """Write a file of records, atomically; raises UserError where that fails."""
    entries = {
        key: {
            "train": list(record.train),
            "test": list(record.test),
            **({"validation": list(record.validation)} if record.validation else {}),
        }
        for key, record in records.items()
    }
    write_json(path, {"records": entries})


def _record(entry: Mapping[str, Any]) -> ImageRecord:
    sides = [entry["train"], entry["test"], entry.get("validation", [])]
    if not all(
        isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides
    ):
        raise TypeError
    return ImageRecord(*map(tuple, sides))
