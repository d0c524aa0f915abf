"""The endless order of minibatches: a pure function of (seed, task, step), so that it can start anywhere."""

import torch
from torch import Tensor

from srfed.errors import UserError
from srfed.randomness import derive_generator


class MinibatchOrder:
    """Which images each local step sees: one pass after another over the task, each in its own order.

    Args:
        images: number of training images n.
        batch_size: images in a minibatch.
        drop_last: leave out the last, smaller minibatch of each pass.
        seed: the run's seed.
        task: the task's name.

    Raises:
        UserError: ``drop_last`` would leave no minibatch at all.
    """

    def __init__(self, images: int, batch_size: int, drop_last: bool, seed: int, task: str) -> None:
        if drop_last and batch_size > images:
            raise UserError(
                f"training.batch_size = {batch_size} is above the {images} training images of task {task!r}; "
                f"allowed: up to {images}, or training.drop_last = false"
            )
        self.images = images
        self.batch_size = batch_size
        self.steps_per_pass = images // batch_size if drop_last else -(-images // batch_size)
        self._seed = seed
        self._task = task
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """Indices of the images of a step: (batch_size,) int64, fewer at the end of a pass."""
        number, position = divmod(step, self.steps_per_pass)
        if number != self._pass:
            generator = derive_generator(self._seed, "minibatch order", self._task, number)
            self._order = torch.randperm(self.images, generator=generator)
            self._pass = number
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]
