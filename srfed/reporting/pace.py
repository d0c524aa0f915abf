"""How long a run will still take: its rounds, and the evaluations between and after them."""

import time

from srfed.config import RunConfig
from srfed.config.choices import SAMPLERS, chosen
from srfed.records import EvaluationRecord, RoundRecord

STEP_TO_PASS = 3.0
"""A training step on an image (forward, backward) against a forward pass: until an evaluation has
been measured.
"""


class Pace:
    """Measures one execution of a run.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._first = 0
        self._began = time.monotonic()
        self._evaluating = 0.0
        self._seconds_per_pass: float | None = None

    def begin(self, last_round: int) -> None:
        """From now on rounds after ``last_round`` are made."""
        self._first, self._began, self._evaluating = last_round, time.monotonic(), 0.0

    def count(self, record: EvaluationRecord, *, clients: int) -> None:
        """Learn from an evaluation of so many clients."""
        self._evaluating += record.seconds
        passes = evaluation_passes(self._config, clients, final=record.final)
        self._seconds_per_pass = record.seconds / passes

    def seconds_left(self, record: RoundRecord, *, clients: int) -> float:
        """Seconds from the end of a round to the end of the run, its last evaluation included.

        Until one evaluation has been measured, its time is put at so many forward passes of the
        round's speed.
        """
        last = self._config.federation.rounds
        spent = time.monotonic() - self._began - self._evaluating
        training = spent / (record.round - self._first) * (last - record.round)
        per_pass = self._seconds_per_pass
        if per_pass is None:
            per_pass = record.seconds / max(1, record.images) / STEP_TO_PASS
        between = self._evaluations_between(record.round)
        passes = between * evaluation_passes(self._config, clients, final=False)
        return training + per_pass * (passes + evaluation_passes(self._config, clients, final=True))

    def _evaluations_between(self, number: int) -> int:
        """The evaluations after round ``number`` and later ones, but for the last."""
        every, last = self._config.evaluation.every, self._config.federation.rounds
        return (last - 1) // every - (number - 1) // every if every else 0


def evaluation_passes(config: RunConfig, clients: int, *, final: bool) -> int:
    """Forward passes of an evaluation, of one image each: samples, and reconstructions for
    SSIM-rec.
    """
    evaluation, sampling = config.evaluation, config.sampling
    every = chosen(SAMPLERS, sampling.sampler).every_timestep
    steps = config.diffusion.timesteps if every else sampling.steps
    samples = evaluation.samples if final else evaluation.samples_between
    timesteps = {evaluation.ssim_timestep, *(evaluation.ssim_curve if final else ())}
    asked = steps * (2 if sampling.guidance else 1)
    return samples * asked + clients * evaluation.ssim_images * sum(timesteps)
