"""Minibatches: which images each step sees, and what it draws for them; pure functions of (seed,
task, step).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srfed.config import RunConfig, TrainingConfig
from srfed.data import to_model_range
from srfed.data.images import Images
from srfed.data.mapped import is_mapped
from srfed.device import to_device
from srfed.diffusion.objective import Objective
from srfed.errors import UserError
from srfed.flat import sent
from srfed.randomness import derive_generator, derive_seed


class TrainingImages:
    """Images as steps are given them; those that lie in a file stay there, and each minibatch is
    read.

    Args:
        sets: uint8 N x H x W x C each, of one shape; counted through.
        device: where the steps are taken.
        layout: of the minibatches.
    """

    def __init__(
        self, sets: Sequence[Images], device: torch.device, layout: torch.memory_format
    ) -> None:
        self._device, self._layout = device, layout
        self._sets = sets
        self._starts = np.cumsum([0, *map(len, sets)])
        mapped = any(map(is_mapped, sets))
        self._ready = None if mapped else torch.cat([self._steps_see(images) for images in sets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Those of these indices, (N,) int64, in [-1, 1]: float32 N x C x H x W on the device."""
        if self._ready is not None:
            return self._ready[to_device(indices, self._device)]
        wanted = indices.numpy()
        sets = np.searchsorted(self._starts, wanted, side="right") - 1
        return self._steps_see(
            np.stack(
                [
                    self._sets[of][index - self._starts[of]]
                    for of, index in zip(sets, wanted, strict=True)
                ]
            )
        )

    def places(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Indices of several minibatches, on the CPU, as those are had fastest by them: on the
        images' device, in one copy.
        """
        return list(indices) if self._ready is None else sent(indices, self._device)

    def _steps_see(self, images: Images) -> Tensor:
        there = to_device(to_model_range(images), self._device)
        return there.contiguous(memory_format=self._layout)


class MinibatchOrder:
    """Which images each local step sees: one pass after another over the task, each in its own
    order.

    Args:
        images: number of training images n.
        batch_size: images in a minibatch.
        minibatches: what becomes of the images left over at the end of a pass: "whole" leaves
            them out, "ragged" makes a smaller minibatch of them, "continued" goes on into the next
            pass.
        seed: the run's seed.
        task: the task's name.

    Raises:
        UserError: under "whole" there would be no minibatch at all.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        minibatches: Literal["whole", "ragged", "continued"],
        seed: int,
        task: str,
    ) -> None:
        if minibatches == "whole" and batch_size > images:
            raise UserError(
                f"training.batch_size = {batch_size} is above the {images} training images of task "
                f"{task!r}; allowed: up to {images}, or training.minibatches = ragged or continued"
            )
        self.images = images
        self.batch_size = batch_size
        self._continued = minibatches == "continued"
        whole = images // batch_size
        self.steps_per_pass = whole if minibatches == "whole" else -(-images // batch_size)
        self._seed = seed
        self._task = task
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.long)

    @classmethod
    def of(
        cls, training: TrainingConfig, images: int, batch_size: int, seed: int, task: str
    ) -> "MinibatchOrder":
        """The order that a run's settings ask for."""
        return cls(images, batch_size, training.minibatches, seed, task)

    def indices(self, step: int) -> Tensor:
        """Indices of the images of a step: (batch_size,) int64, fewer at the end of a pass."""
        if not self._continued:
            number, position = divmod(step, self.steps_per_pass)
            return self._in_pass(number)[
                position * self.batch_size : (position + 1) * self.batch_size
            ]
        first, wanted = step * self.batch_size, self.batch_size
        parts = []
        while wanted:
            number, position = divmod(first, self.images)
            parts.append(self._in_pass(number)[position : position + wanted])
            first, wanted = first + len(parts[-1]), wanted - len(parts[-1])
        return torch.cat(parts)

    def images_until(self, step: int) -> int:
        """How many images the steps before this one have seen, with repetition."""
        if self._continued:
            return step * self.batch_size
        number, position = divmod(step, self.steps_per_pass)
        in_pass = min(self.images, self.steps_per_pass * self.batch_size)
        return number * in_pass + min(self.images, position * self.batch_size)

    def _in_pass(self, number: int) -> Tensor:
        if number != self._pass:
            generator = derive_generator(self._seed, "minibatch order", self._task, number)
            self._order = torch.randperm(self.images, generator=generator)
            self._pass = number
        return self._order


class Minibatch(NamedTuple):
    """What a step trains on: images in [-1, 1] (N x C x H x W), times (N,), noise as the images."""

    images: Tensor
    times: Tensor
    noise: Tensor


class Draws(NamedTuple):
    """What a step draws for its images, on the CPU: times (N,), noise as the images, and which of
    them are mirrored, bool N x 1 x 1 x 1; None: none.
    """

    times: Tensor
    noise: Tensor
    mirrored: Tensor | None


def draw_for(
    config: RunConfig,
    objective: Objective,
    shape: Sequence[int],
    task: str,
    round_number: int,
    step: int,
) -> Draws:
    """The draws for images of this shape, N x C x H x W (lines 3 to 5 of Algorithm 1).

    By the CPU's generator, whose draws are the same wherever the images are.
    """
    generator = derive_generator(config.seed, "training", task, round_number, step)
    mirrored = None
    if config.data.horizontal_flip:
        mirrored = torch.rand(shape[0], 1, 1, 1, generator=generator) < 0.5
    times = objective.draw_times(shape[0], generator)
    return Draws(times, torch.randn(tuple(shape), generator=generator), mirrored)


def with_draws(images: Sequence[Tensor], draws: Sequence[Draws]) -> Minibatch:
    """Images of one task, or of several, one after the other, with what was drawn for them, which
    goes to their device as one.
    """

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    whole = joined(images)
    mirrored = [drawn.mirrored for drawn in draws if drawn.mirrored is not None]
    if mirrored:
        whole = torch.where(to_device(joined(mirrored), whole.device), whole.flip(-1), whole)
    times, noise = (
        to_device(joined(tensors), whole.device)
        for tensors in ([drawn.times for drawn in draws], [drawn.noise for drawn in draws])
    )
    return Minibatch(whole, times, noise)


def draw_minibatch(
    config: RunConfig, objective: Objective, images: Tensor, task: str, round_number: int, step: int
) -> Minibatch:
    """Images of one task with their draws, see :func:`draw_for`."""
    drawn = draw_for(config, objective, images.shape, task, round_number, step)
    return with_draws([images], [drawn])


@contextmanager
def seeded_dropout(
    config: RunConfig, device: torch.device, task: str, round_number: int, step: int
) -> Iterator[None]:
    """Dropout takes no generator of its own; lend it the process's, seeded for this step."""
    if not config.model.draws:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, "dropout", task, round_number, step))
        yield
