"""Training images set aside: to choose a round by, which the test images must not."""

from collections import Counter

import numpy as np

from srfed.config import DataConfig
from srfed.data.images import Images
from srfed.data.mapped import chosen_images
from srfed.data.record import ImageRecord, fingerprints
from srfed.errors import UserError


def set_aside(
    config: DataConfig, name: str, train: Images, known: ImageRecord | None = None
) -> tuple[Images, Images]:
    """Divide a task's training images into those to train on and ``validation_images`` others.

    Those with the lowest fingerprints are set aside, so the images' order does not matter, and
    equal images are on one side, even where that takes a few more. An image that is ``known`` stays
    where it was as long as the numbers allow it. Both sides keep the order of the images.

    Args:
        config: says how many.
        name: the task's, for errors.
        train: uint8 N x H x W x C, after ``images_per_task``.
        known: of an earlier time.

    Raises:
        UserError: nothing would be left to train on.
    """
    wanted = config.validation_images
    if not wanted:
        return train, train[:0]
    names = fingerprints(train)
    counts = Counter(names)
    aside = set() if known is None else counts.keys() & {*known.validation}
    trained = set() if known is None else {*known.train}
    others = sorted(counts.keys() - aside, key=lambda one: (one in trained, one))
    while others and sum(counts[one] for one in aside) < wanted:
        aside.add(others.pop(0))
    chosen = np.array([one in aside for one in names], dtype=bool)
    if chosen.all():
        raise UserError(
            f"data.validation_images = {wanted} leaves nothing to train on of the {len(names)} "
            f"training images of task {name}; allowed: 0, or 2 and more where others that differ "
            "are left"
        )
    return chosen_images(train, ~chosen), chosen_images(train, chosen)
