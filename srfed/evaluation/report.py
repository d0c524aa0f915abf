"""From what each task's owner reports to the record of an evaluation, made here alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from srfed.config import EvaluationConfig
from srfed.data.images import Images
from srfed.evaluation.metrics.memorisation import Audit
from srfed.evaluation.metrics.nearest_neighbour import Recogniser
from srfed.evaluation.references import Scores
from srfed.records import Colour, Comparison, EvaluationRecord, OwnScore, ResultRound


@dataclass(frozen=True, eq=False)
class TaskReport:
    """What of one task's evaluation is for the record.

    Attributes:
        images, strip: uint8 N x H x W x C and K x H x W x C; None where they stay with the owner.
        ssim: SSIM-rec by timestep; empty where there is none.
        ssim_window: side of its window, px.
        audit: the memorisation audit, if there was one.
        comparison: what joining is worth, where that is compared and told.
    """

    images: Images | None
    strip: Images | None
    ssim: dict[int, float]
    ssim_window: int
    audit: Audit | None
    comparison: Comparison | None = None


class Recognised(NamedTuple):
    """Whose the samples are (:class:`~srfed.evaluation.metrics.nearest_neighbour.Recogniser`).

    Attributes:
        by_client: the share that is given to its own client.
        real: the same of held-out real images of these clients.
    """

    by_client: Mapping[str, float]
    real: float | None

    @classmethod
    def of(cls, recogniser: Recogniser, samples: Mapping[str, Images]) -> "Recognised":
        return cls(recogniser.shares(samples), recogniser.accuracy(samples))


@dataclass(frozen=True)
class Exchanged:
    """What asking the owners came to; nothing where one party has all images.

    Attributes:
        refused, missing: whose report is not there, and why.
        bytes_up, bytes_down: of all messages.
    """

    refused: Mapping[str, str]
    missing: Mapping[str, str]
    bytes_up: int = 0
    bytes_down: int = 0


def evaluation_record(
    settings: EvaluationConfig,
    round_number: int,
    reports: Mapping[str, TaskReport],
    scores: Scores,
    floor: float | None,
    *,
    final: bool,
    seconds: float,
    recognised: Recognised | None = None,
    exchanged: Exchanged | None = None,
    result: ResultRound | None = None,
    own: Mapping[str, OwnScore] | None = None,
    colours: Mapping[str, Colour] | None = None,
) -> EvaluationRecord:
    """The record of an evaluation.

    Args:
        settings: the run's.
        round_number: the round after which it was made.
        reports: by client, at least one.
        scores: of their samples.
        floor: what real training images would score.
        final: the evaluation at the end of the run.
        seconds: wall time.
        recognised: whose the samples are, where the server has real images.
        exchanged: how the owners were asked.
        result: the round whose weights were judged; None where that is the same.
        own: what metrics of one's own say.
        colours: of samples and held-out images, where the server has both.
    """
    exchanged = exchanged or Exchanged({}, {})
    by_client, real = recognised or Recognised({}, None)
    curves = {client: report.ssim for client, report in reports.items() if report.ssim}
    return EvaluationRecord(
        round=round_number,
        final=final,
        score_name=scores.name,
        score=scores.overall,
        score_by_client=scores.per_task,
        floor=floor,
        samples=scores.samples,
        references=scores.references,
        ssim_timestep=settings.ssim_timestep,
        ssim=_mean_curve(curves),
        ssim_by_client={client: curve[settings.ssim_timestep] for client, curve in curves.items()},
        ssim_window=min((reports[client].ssim_window for client in curves), default=0),
        ssim_steps=settings.ssim_steps,
        audits={c: report.audit for c, report in reports.items() if report.audit is not None},
        comparisons={
            client: report.comparison
            for client, report in reports.items()
            if report.comparison is not None
        },
        grids={
            client: report.images[: settings.grid_columns]
            for client, report in reports.items()
            if report.images is not None
        },
        strips={c: report.strip for c, report in reports.items() if report.strip is not None},
        refused=dict(exchanged.refused),
        missing=dict(exchanged.missing),
        bytes_up=exchanged.bytes_up,
        bytes_down=exchanged.bytes_down,
        seconds=seconds,
        recognised=fmean(by_client.values()) if by_client else None,
        recognised_by_client=dict(by_client),
        recognised_real=real,
        result=result,
        own=dict(own or {}),
        colours=dict(colours or {}),
    )


def _mean_curve(curves: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """The mean at each timestep, over the tasks that have it."""
    timesteps = sorted({timestep for curve in curves.values() for timestep in curve})
    means = {}
    for timestep in timesteps:
        values = [curve[timestep] for curve in curves.values() if timestep in curve]
        means[timestep] = sum(values) / len(values)
    return means
