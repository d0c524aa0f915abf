"""How far a run is and how long it will still take: its rounds, and the evaluations between and
after them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from srfed.config import RunConfig
from srfed.config.choices import SAMPLERS, chosen
from srfed.evaluation.metrics.denoising_loss import MOMENTS
from srfed.observer import Stage
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.work import STEP_TO_PASS, passes_done

Kind = Literal["round", "between", "final"]
"""Stages of one cost: a round, an evaluation between rounds, the last one."""
TOLD = 0.02
"""The share of a stage that has to be done before its time says how long all of it takes."""


@dataclass
class _Seen:
    """The stages of one kind that have ended: seconds of each, passes of the last."""

    seconds: list[float] = field(default_factory=list)
    passes: int = 0

    @property
    def mean(self) -> float:
        """Seconds of one; the first, in which processes start and caches fill, counts only until
        there is another.
        """
        later = self.seconds[1:] or self.seconds
        return sum(later) / len(later)


class Pace:
    """Measures one execution of a run by the clock, and by the passes that are counted
    (:mod:`srfed.work`).

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._seen: dict[Kind, _Seen] = {"round": _Seen(), "between": _Seen(), "final": _Seen()}
        self._tasks: list[TaskInfo] = []
        self._stage: Kind | None = None
        # Rounds that have ended or are under way, and the first round whose evaluation has not
        # begun.
        self._rounds, self._evaluated_from = 0, 1
        self._is_over = False
        self._heard = 0.0
        self._marked()

    def begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        """From now on rounds after ``last_round`` are made, with these tasks."""
        self._tasks, self._rounds, self._evaluated_from = list(tasks), last_round, last_round + 1
        self._marked()

    def join(self, task: TaskInfo) -> None:
        """One more task takes part."""
        if task.client not in {known.client for known in self._tasks}:
            self._tasks.append(task)

    def start(self, what: Stage, number: int, *, final: bool = False) -> None:
        """A round of this number, or an evaluation after it, is made from now on."""
        self._heard = 0.0
        if what == "round":
            self._stage, self._rounds, self._evaluated_from = "round", number, number
        else:
            self._stage, self._evaluated_from = "final" if final else "between", number + 1

    def hear(self, done: int, total: int) -> None:
        """So many of the clients that are asked have answered; what they are asked besides, in the
        same stage, changes nothing.
        """
        self._heard = max(self._heard, done / total if total else 0.0)

    def end_round(self, record: RoundRecord) -> None:
        """Learn from a round."""
        self._rounds = self._evaluated_from = record.round
        self._learn("round", STEP_TO_PASS * record.images)

    def end_evaluation(self, record: EvaluationRecord) -> None:
        """Learn from an evaluation."""
        self._evaluated_from, self._is_over = record.round + 1, record.final
        kind: Kind = "final" if record.final else "between"
        self._learn(kind, self._expected(kind))

    def share(self) -> float:
        """How much of the stage at hand is done, 0 to 1: by its passes where they are counted, else
        by the clients that have answered.
        """
        if self._stage is None:
            return 0.0
        counted = (passes_done() - self._since) / max(1, self._passes(self._stage))
        return min(1.0, max(counted, self._heard))

    def seconds_left(self) -> float | None:
        """Seconds to the end of the run, its last evaluation included; None where nothing is known
        yet.
        """
        last, every = self._config.federation.rounds, self._config.evaluation.every
        ahead: dict[Kind, int] = {
            "round": last - self._rounds,
            "between": max(0, (last - 1) // every - (self._evaluated_from - 1) // every)
            if every
            else 0,
            "final": 0 if self._is_over or self._stage == "final" else 1,
        }
        seconds = self._seconds_of_stage()
        for kind, count in ahead.items():
            if count:
                cost = self._cost(kind)
                if cost is None or seconds is None:
                    return None
                seconds += count * cost
        return seconds

    def _seconds_of_stage(self) -> float | None:
        """Of the stage at hand, what is left."""
        if self._stage is None:
            return 0.0
        cost = self._cost(self._stage)
        if cost is None:
            return None
        share, spent = self.share(), time.monotonic() - self._mark
        return cost * (1 - share) if share else max(0.0, cost - spent)

    def _cost(self, kind: Kind) -> float | None:
        """Seconds of a stage: those of its like; else at the pace of what is most like it."""
        if self._seen[kind].seconds:
            return self._seen[kind].mean
        like: tuple[Kind, ...] = (kind, "between", "final", "round")
        paces = (self._seconds_per_pass(other) for other in like)
        pace = next((one for one in paces if one is not None), None)
        return None if pace is None else pace * self._passes(kind)

    def _seconds_per_pass(self, kind: Kind) -> float | None:
        """Of the stages of a kind that have ended, or of the one at hand, once enough of it is
        done.
        """
        seen, passes = self._seen[kind], max(1, self._passes(kind))
        if seen.seconds:
            return seen.mean / passes
        if kind == self._stage and (share := self.share()) > TOLD:
            return (time.monotonic() - self._mark) / share / passes
        return None

    def _learn(self, kind: Kind, passes: int) -> None:
        """What has passed since the stage before it ended is this one's."""
        seen = self._seen[kind]
        seen.passes = passes_done() - self._since or passes
        seen.seconds.append(time.monotonic() - self._mark)
        self._marked()

    def _marked(self) -> None:
        self._stage = None
        self._mark, self._since = time.monotonic(), passes_done()

    def _passes(self, kind: Kind) -> int:
        """Of a stage: those of the last of its like, or as many as it should take."""
        return self._seen[kind].passes or self._expected(kind)

    def _expected(self, kind: Kind) -> int:
        if kind == "round":
            return round_passes(self._config, [task.images for task in self._tasks])
        tested = [task.test_images for task in self._tasks]
        return evaluation_passes(
            self._config, len(tested), final=kind == "final"
        ) + comparison_passes(self._config, tested)


def round_passes(config: RunConfig, images: Sequence[int]) -> int:
    """About as many passes as a round takes of tasks with so many training images."""
    training, federation = config.training, config.federation
    steps = training.local_steps
    seen = sum(
        (training.local_epochs or 0) * count if steps is None else steps * training.batch_size
        for count in images
    )
    asked = min(federation.clients_per_round or len(images), len(images))
    models = 1 if federation.compare == "none" else 2
    return STEP_TO_PASS * models * seen * asked // max(1, len(images))


def evaluation_passes(config: RunConfig, clients: int, *, final: bool) -> int:
    """Forward passes of an evaluation of ``clients`` or those drawn of them, of one image each:
    samples, and reconstructions for SSIM-rec.
    """
    evaluation, sampling = config.evaluation, config.sampling
    every = chosen(SAMPLERS, sampling.sampler).every_timestep
    steps = config.diffusion.timesteps if every else sampling.steps
    samples = evaluation.samples if final else evaluation.samples_between
    timesteps = {evaluation.ssim_timestep, *(evaluation.ssim_curve if final else ())}
    most = evaluation.ssim_steps or config.diffusion.timesteps
    asked = steps * (2 if sampling.guidance else 1)
    judged = min(clients, config.evaluated_clients)
    return samples * asked + judged * evaluation.ssim_images * sum(min(t, most) for t in timesteps)


def comparison_passes(config: RunConfig, test_images: Sequence[int]) -> int:
    """Forward passes with which an evaluation compares each owner's model with one of its own
    images alone.
    """
    return 0 if config.federation.compare == "none" else 2 * MOMENTS * sum(test_images)
