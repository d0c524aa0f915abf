"""The short table at the end of a run, made from metrics.jsonl alone."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from srfed.records import Colour, Comparison, ResultRound, TaskInfo, ssim_name
from srfed.reporting.joining import joining_table
from srfed.storage.metrics_log import MetricsLog
from srfed.units import bytes_in_words, seconds_in_words

MOST_NAMED = 10
"""Tasks that a sentence names."""
MOST_ROWS = 40
"""Tasks that have a row each in the table."""


@dataclass(frozen=True)
class Totals:
    """Sums over a run's rounds and evaluations: images trained on, bytes, seconds."""

    rounds: int
    images: int
    bytes_up: int
    bytes_down: int
    training_seconds: float
    evaluation_seconds: float


def totals(log: MetricsLog) -> Totals:
    """Add up a run's records."""
    rounds, evaluations = log.rounds(), log.evaluations()
    both = [*rounds, *evaluations]
    return Totals(
        rounds=len(rounds),
        images=sum(line["images"] for line in rounds),
        bytes_up=sum(line["bytes_up"] for line in both),
        bytes_down=sum(line["bytes_down"] for line in both),
        training_seconds=sum(line["seconds"] for line in rounds),
        evaluation_seconds=sum(line["seconds"] for line in evaluations),
    )


def summarise(log: MetricsLog, wall_seconds: float) -> str:
    """The table: each task and all of them, then time and traffic.

    Args:
        log: the run's records.
        wall_seconds: of the command that just ended; what is neither training nor evaluation of its
            own was start-up and shutdown.
    """
    evaluations = log.evaluations()
    lines = _table(log, evaluations[-1]) if evaluations else []
    sums = totals(log)
    lines += [
        "",
        f"{sums.rounds} rounds, {sums.images:,} images; training "
        f"{seconds_in_words(sums.training_seconds)}, evaluation "
        f"{seconds_in_words(sums.evaluation_seconds)}, this command "
        f"{seconds_in_words(wall_seconds)} in all",
        f"traffic: {bytes_in_words(sums.bytes_up)} from the clients, "
        f"{bytes_in_words(sums.bytes_down)} to them",
    ]
    return "\n".join(lines)


def _table(log: MetricsLog, evaluation: dict[str, Any]) -> list[str]:
    score = evaluation["score_name"]
    ssim = ssim_name(evaluation["ssim_timestep"], evaluation.get("ssim_steps"))
    wide = max(12, len(ssim))
    losses = log.rounds()[-1]["loss_by_client"] if log.rounds() else {}
    tasks = log.tasks()
    recognised = evaluation.get("recognised_by_client", {})
    rows: list[tuple[str, list[float | None]]] = [
        (
            task.task,
            [
                task.images,
                *(
                    by_client.get(task.client)
                    for by_client in (
                        losses,
                        evaluation["score_by_client"],
                        evaluation["ssim_by_client"],
                        recognised,
                    )
                ),
            ],
        )
        for task in tasks
    ]
    many = len(rows) > MOST_ROWS
    if many:
        rows = _quantiles([values for _, values in rows])
    width = max(len(name) for name in ("all tasks", *(name for name, _ in rows)))
    lines = [
        f"{'task':<{width}}  {'images':>7}  {'loss':>7}  {score:>12}  {ssim:>{wide}}"
        + ("  recognised" if recognised else "")
    ]
    for name, (images, loss, own, similarity, share) in rows:
        lines.append(
            f"{name:<{width}}  {images:>7,.0f}  {_cell(loss, 7, 4)}  {_cell(own, 12, 3)}  "
            f"{_cell(similarity, wide, 3)}" + (f"  {_cell(share, 10, 2)}" if recognised else "")
        )
    last = log.rounds()[-1]["loss"] if log.rounds() else None
    overall = evaluation["ssim"].get(str(evaluation["ssim_timestep"]))
    lines.append(
        f"{'all tasks':<{width}}  {sum(task.images for task in tasks):>7,}  {_cell(last, 7, 4)}  "
        f"{_cell(evaluation['score'], 12, 3)}  {_cell(overall, wide, 3)}"
        + (f"  {_cell(evaluation['recognised'], 10, 2)}" if recognised else "")
    )
    lines.append("")
    if many:
        judged = len(evaluation["score_by_client"])
        lines.append(
            f"least, median and greatest of {len(tasks):,} tasks, of which {judged:,} were judged, "
            "each column by itself; every task is in metrics.jsonl"
        )
    lines += scores_in_words(tasks, evaluation)
    compared = comparisons_of(tasks, evaluation)
    return [*lines, "", *joining_table(compared)] if compared else lines


def _quantiles(
    tasks: Sequence[Sequence[float | None]],
) -> list[tuple[str, list[float | None]]]:
    """A row each for the least, the median and the greatest of every column; None where it has
    none.
    """
    columns = [
        [value for value in column if value is not None] for column in zip(*tasks, strict=True)
    ]
    named = (("least", min), ("median", statistics.median), ("greatest", max))
    return [
        (name, [quantile(column) if column else None for column in columns])
        for name, quantile in named
    ]


def scores_in_words(tasks: Sequence[TaskInfo], evaluation: Mapping[str, Any]) -> list[str]:
    """What the scores of an evaluation's line rest on, a sentence each."""
    lines = []
    score, recognised = evaluation["score_name"], evaluation.get("recognised_by_client", {})
    if found := evaluation.get("result"):
        lines.append(ResultRound(**found).in_words(evaluation["round"]))
    floor = evaluation["floor"]
    real = "" if floor is None else f"; the real training images score {floor:.3f}"
    lines.append(
        f"{score}: Fréchet distance of {evaluation['samples']} samples to "
        f"{evaluation['references']} held-out images (0 is best{real}); by task it rests on few "
        "images and is biased upwards"
    )
    curve = ", ".join(
        f"t={timestep}: {value:.3f}" for timestep, value in evaluation["ssim"].items()
    )
    if curve:
        window, steps = evaluation["ssim_window"], evaluation.get("ssim_steps")
        way = "Algorithm 2" if steps is None else f"DDIM without noise in at most {steps} steps"
        lines.append(
            f"SSIM-rec: test images brought back from x_t by {way} (window {window} px; 1 is "
            f"best): {curve}"
        )
    if recognised and (real := evaluation["recognised_real"]) is not None:
        lines.append(
            "recognised: share of a task's samples that the 3 nearest real training images of all "
            f"tasks give to it; held-out real images: {real:.2f}"
        )
    lines += _colours_in_words(tasks, evaluation)
    absent = sorted({*evaluation.get("refused", {}), *evaluation.get("missing", {})})
    if absent:
        lines.append(
            f"all tasks: the scores are without {', '.join(absent[:MOST_NAMED])}"
            + (f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else "")
            + ", so they cannot be compared with those of an evaluation of others"
        )
    for name, own in evaluation.get("own", {}).items():
        values = [value for value in own["by_client"].values() if value is not None]
        total = "" if own["all"] is None else f"{own['all']:.4g} of all images together; "
        if values:
            lines.append(
                f"{name}, a metric of one's own: {total}by owner {min(values):.4g} to "
                f"{max(values):.4g}"
            )
    audits = evaluation.get("audits", {})
    if audits:
        fired = [task.task for task in tasks if audits.get(task.client, {}).get("fires")]
        pixels, features = (
            sum(one[f"{space}_share"] for one in audits.values()) / len(audits)
            for space in ("pixels", "features")
        )
        quantile = next(iter(audits.values()))["pixels_quantile"]
        lines.append(
            f"memorisation audit: {pixels:.1%} (pixels) and {features:.1%} (features) of the "
            f"samples are nearer to a training image than {quantile:.1%} of held-out images; "
            + (f"it fires for {', '.join(fired)}" if fired else "it fires for no task")
        )
    return lines


def _colours_in_words(tasks: Sequence[TaskInfo], evaluation: Mapping[str, Any]) -> list[str]:
    """Mean colour and spread of samples and held-out images, and where they differ by more than
    real images do.
    """
    found = {
        task.task: Colour(**known)
        for task in tasks
        if (known := evaluation.get("colours", {}).get(task.client))
    }
    if not found:
        if "colours" not in evaluation:
            return []
        # Two sums of levels a task would be more than the owners of a deployment have agreed to.
        return [
            "colour: not compared, as the server has not both samples and held-out images of any "
            "task (under evaluation.mode = statistics it gets features' statistics alone)"
        ]
    shown = [f"{name} {one.in_words}" for name, one in list(found.items())[:MOST_NAMED]]
    more = f"; {len(found) - MOST_NAMED} more in metrics.jsonl" * (len(found) > MOST_NAMED)
    differing = [
        f"those of {name} are {said}" for name, one in found.items() if (said := one.differences)
    ]
    return [
        "colour: mean of 0 to 255 ± spread between images, of samples and held-out images: "
        f"{'; '.join(shown)}{more}",
        *(
            [f"samples differ from real images by more than these do: {'; '.join(differing)}"]
            if differing
            else []
        ),
    ]


def comparisons_of(
    tasks: Sequence[TaskInfo], evaluation: Mapping[str, Any]
) -> dict[str, Comparison]:
    """What joining is worth by task, where an evaluation's line has it."""
    return {
        task.task: Comparison(**{one.name: found[one.name] for one in fields(Comparison)})
        for task in tasks
        if (found := evaluation.get("comparisons", {}).get(task.client))
    }


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
