"""The curves of a run's page, made of the lines of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srfed.records import TaskInfo, ssim_name
from srfed.reporting.plots import Curve, Drawing, draw_intervals, draw_lines
from srfed.reporting.summary import comparisons_of

Line = Mapping[str, Any]
Keys = tuple[Any, ...]
MOST_OWNERS = 50
"""Of more owners only the mean is drawn: lines that nobody can follow weigh megabytes."""


@dataclass(frozen=True)
class PagePlot:
    """A curve with its heading, and what it shows in a sentence."""

    title: str
    about: str
    drawing: Drawing


def page_plots(
    tasks: Sequence[TaskInfo], rounds: Sequence[Line], evaluations: Sequence[Line]
) -> list[PagePlot]:
    """Every curve for which there are numbers; those that are not finite are left out."""
    plots = [*_of_rounds(tasks, rounds), *_of_evaluations(tasks, evaluations)]
    if evaluations and (compared := comparisons_of(tasks, evaluations[-1])):
        plots.append(
            PagePlot(
                "Alone over together",
                "Loss alone over loss together with its 95% interval: right of 1 joining pays. "
                + ", ".join(f"{number} {owner}" for number, owner in enumerate(compared, 1)),
                draw_intervals(
                    [(one.low, one.ratio, one.high) for one in compared.values()],
                    x_label="loss alone / loss together",
                    level=1.0,
                ),
            )
        )
    return plots


def _of_rounds(tasks: Sequence[TaskInfo], rounds: Sequence[Line]) -> list[PagePlot]:
    plots = []
    by_owner = _curves(rounds, [("mean", ("loss",)), *_by_owner(tasks, "loss_by_client")])
    if by_owner:
        plots.append(
            PagePlot(
                "Training loss",
                "Mean over the owners of a round, and of each.",
                draw_lines(by_owner, x_label="round", y_label="loss", log_y=True),
            )
        )
    quarters = _curves(
        [{**line, "quarter": dict(enumerate(line["loss_by_quarter"], 1))} for line in rounds],
        [(f"quarter {number}", ("quarter", number)) for number in (1, 2, 3, 4)],
    )
    if quarters:
        plots.append(
            PagePlot(
                "Loss by timestep",
                "By quarter of the timesteps: the first has the least noise.",
                draw_lines(quarters, x_label="round", y_label="loss", log_y=True),
            )
        )
    asked = [
        {**line["validation"], "round": line["round"]} for line in rounds if line.get("validation")
    ]
    validation = _curves(asked, [("mean", ("loss",)), *_by_owner(tasks, "loss_by_client")])
    if validation:
        plots.append(
            PagePlot(
                "Validation loss",
                "On images set aside to choose a round by.",
                draw_lines(validation, x_label="round", y_label="loss"),
            )
        )
    disagreement = _curves(rounds, [("disagreement", ("disagreement",))])
    if disagreement and len(tasks) > 1:
        plots.append(
            PagePlot(
                "Disagreement",
                "0 when all owners moved the shared part alike, 1 when their moves cancel.",
                draw_lines(disagreement, x_label="round", y_label="disagreement"),
            )
        )
    return plots


def _of_evaluations(tasks: Sequence[TaskInfo], evaluations: Sequence[Line]) -> list[PagePlot]:
    plots = []
    last = evaluations[-1] if evaluations else {}
    score = _curves(evaluations, [("all", ("score",)), *_by_owner(tasks, "score_by_client")])
    if score:
        floor = last["floor"]
        dashed = "" if floor is None else f" Dashed: the real training images ({floor:.3f})."
        plots.append(
            PagePlot(
                f"{last['score_name']}",
                f"Fréchet distance, lower is better; an owner's is biased upwards.{dashed}",
                draw_lines(score, x_label="round", y_label="distance", level=floor),
            )
        )
    ssim = _curves(
        evaluations,
        [("mean", ("ssim", str(last.get("ssim_timestep")))), *_by_owner(tasks, "ssim_by_client")],
    )
    if ssim:
        plots.append(
            PagePlot(
                ssim_name(last["ssim_timestep"], last.get("ssim_steps")),
                "Test images brought back from noise, higher is better.",
                draw_lines(ssim, x_label="round", y_label="SSIM"),
            )
        )
    recognised = _curves(
        evaluations, [("mean", ("recognised",)), *_by_owner(tasks, "recognised_by_client")]
    )
    if recognised:
        real = last.get("recognised_real")
        dashed = "" if real is None else f" Dashed: held-out real images ({real:.2f})."
        plots.append(
            PagePlot(
                "Recognised",
                f"Share of samples that are given to their own owner.{dashed}",
                draw_lines(recognised, x_label="round", y_label="share", level=real),
            )
        )
    for name in last.get("own", {}):
        everything = [("all", ("own", name, "all"))]
        owners = _by_owner(tasks, "own", name, "by_client")
        if own := _curves(evaluations, [*everything, *owners]):
            plots.append(
                PagePlot(
                    name,
                    "A metric of one's own, of real and generated images.",
                    draw_lines(own, x_label="round", y_label=name),
                )
            )
    return plots


def _by_owner(tasks: Sequence[TaskInfo], *keys: str) -> list[tuple[str, Keys]]:
    return (
        [(task.task, (*keys, task.client)) for task in tasks] if len(tasks) <= MOST_OWNERS else []
    )


def _curves(lines: Sequence[Line], wanted: Sequence[tuple[str, Keys]]) -> list[tuple[str, Curve]]:
    """Label, rounds and values under these keys, where there are any."""
    curves: list[tuple[str, Curve]] = []
    for label, keys in wanted:
        points = [
            (line["round"], value)
            for line in lines
            if (value := _at(line, keys)) is not None and math.isfinite(value)
        ]
        if points:
            curves.append((label, ([x for x, _ in points], [y for _, y in points])))
    return curves


def _at(line: Line, keys: Keys) -> float | None:
    value: Any = line
    for key in keys:
        value = (value or {}).get(key)
    return None if value is None else float(value)
