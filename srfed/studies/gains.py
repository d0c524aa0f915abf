"""What the sides of a study of joining come to: a row a run, a row an owner, tables, a picture."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from srfed.evaluation.metrics.denoising_loss import BANDS, Losses, Ratio, paired_ratio
from srfed.files import exists, read_bytes, write_bytes
from srfed.reporting.plots import line_plot
from srfed.studies.cases import mean_and_spread, run_jobs, write_csv
from srfed.studies.joining import ALONE, POOLED, SIDES, Cell
from srfed.units import bytes_in_words, seconds_in_words

SCORES = ("recognised", "copies", "frechet", "kernel", "ssim")
"""Of an owner, besides its losses."""


def run_cells(asked: Sequence[Cell], pool: Path, jobs: int, out: Path) -> list[dict[str, Any]]:
    """Train and judge what is missing; each cell is a line of ``out/cells.csv`` as soon as it is
    there. Raises UserError as :func:`srfed.studies.cases.run_jobs`.
    """
    by_folder = {cell.folder(pool): cell for cell in asked}
    return run_jobs(
        [cell.job(pool) for cell in asked],
        pool,
        jobs,
        lambda job, outcome: add_row(out / "cells.csv", row_of(by_folder[job.folder], outcome)),
    )


def row_of(cell: Cell, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """One cell: what was run, and means over its owners."""
    owners = list(outcome["owners"].values())
    config = cell.config
    return {
        "set": cell.owners,
        "side": cell.side,
        "seed": config.seed,
        "config_hash": outcome["fingerprint"][:12],
        "every": cell.judging.every,
        "samples": cell.judging.samples,
        "test_images": cell.judging.test_images,
        "patience": cell.judging.patience,
        "asked_rounds": config.federation.rounds,
        "owners": len(owners),
        "images_per_owner": outcome["images_per_owner"],
        "image_size": config.data.image_size,
        "channels": config.data.channels,
        "rounds": outcome["rounds"],
        "local_steps": config.training.local_steps,
        "learning_rate": config.training.learning_rate,
        "own_learning_rate": config.training.exclusive_learning_rate,
        "control_variates": config.training.control_variates,
        "server_optimizer": config.federation.server_optimizer,
        "best_round": _digits(mean(owner["round"] for owner in owners)),
        **{
            name: _digits(mean(owner[name] for owner in owners))
            for name in ("validation", "loss", *BANDS)
        },
        **{name: _mean_of([owner[name] for owner in owners]) for name in SCORES},
        "recognised_real": _digits(outcome["recognised_real"]),
        "shared_parameters": outcome["parameters"]["shared"],
        "exclusive_parameters": outcome["parameters"]["exclusive"],
        "bytes": outcome["bytes"],
        "core_seconds": round(outcome["core_seconds"], 1),
    }


KEY = (
    "set",
    "side",
    "seed",
    "config_hash",
    "every",
    "samples",
    "test_images",
    "patience",
    "asked_rounds",
)
"""What a line of cells.csv is known by."""


def add_row(path: Path, row: Mapping[str, Any], key: Sequence[str] = KEY) -> None:
    """Add a line to a CSV, or put it in the place of the same cell's; the file is whole at any
    time.

    Columns that a file of an earlier version lacks are left empty there.

    Args:
        path: the file.
        row: the line, by column.
        key: columns that a cell's line is known by.
    """
    text = read_bytes(path).decode() if exists(path) else ""
    told = {name: "" if value is None else str(value) for name, value in row.items()}
    kept = [
        {name: old.get(name, "") for name in row}
        for old in csv.DictReader(io.StringIO(text))
        if any(old.get(name) != told[name] for name in key)
    ]
    write_csv(path, [*kept, told])


def report(asked: Sequence[Cell], outcomes: Sequence[dict[str, Any]], out: Path) -> str:
    """Write owners.csv, sides.csv, sides.md and loss.png; returns the table."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for cell, outcome in zip(asked, outcomes, strict=True):
        found.setdefault(cell.config.seed, {})[cell.side] = outcome
    rows = []
    for cell, outcome in zip(asked, outcomes, strict=True):
        sides = found[cell.config.seed]
        ratio = _ratio(_losses([sides[ALONE]]), _losses([outcome]))
        rows.append(
            row_of(cell, outcome)
            | {"alone_over_it": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            | {"gap_closed": gap_closed(sides, cell.side)}
        )
    write_csv(out / "sides.csv", rows)
    write_csv(out / "owners.csv", owner_rows(asked, outcomes, found))
    line_plot(
        out / "loss.png",
        {side: _curve([sides[side] for sides in found.values()]) for side in _sides(asked)},
        x_label="round",
        y_label="loss on validation images, mean over owners",
        title=f"{asked[0].owners}, {len(outcomes[0]['owners'])} owners",
        log_y=True,
    )
    text = describe(asked, list(found.values()))
    write_bytes(out / "sides.md", text.encode())
    return text


def owner_rows(
    asked: Sequence[Cell],
    outcomes: Sequence[dict[str, Any]],
    found: Mapping[int, Mapping[str, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """One row for each owner, side and seed."""
    rows = []
    for cell, outcome in zip(asked, outcomes, strict=True):
        alone = _losses([found[cell.config.seed][ALONE]])
        own = _losses([outcome])
        for name, owner in outcome["owners"].items():
            ratio = _ratio({name: alone[name]}, {name: own[name]})
            rows.append(
                {
                    "set": cell.owners,
                    "owner": name,
                    "side": cell.side,
                    "seed": cell.config.seed,
                    "best_round": owner["round"],
                    **{key: owner[key] for key in ("validation", "loss", *BANDS)},
                    "alone_over_it": ratio.value,
                    "ratio_low": ratio.low,
                    "ratio_high": ratio.high,
                    **{key: owner[key] for key in SCORES},
                }
            )
    return rows


def gap_closed(sides: Mapping[str, Mapping[str, Any]], side: str) -> float | None:
    """The share of the way from alone to pooled that a side has come, by the mean loss over owners;
    None where pooled is no better than alone, or was not asked for.
    """
    if POOLED not in sides:
        return None
    loss = {name: mean_over_owners(outcome) for name, outcome in sides.items()}
    gap = loss[ALONE] - loss[POOLED]
    return (loss[ALONE] - loss[side]) / gap if gap > 0 else None


def describe(asked: Sequence[Cell], seeds: Sequence[Mapping[str, dict[str, Any]]]) -> str:
    """The sides in Markdown, with what the numbers depend on."""
    some, config = seeds[0][ALONE], asked[0].config
    name = some["score_name"]
    lines = [
        f"| side | held-out loss | {' | '.join(f'{band} noise' for band in BANDS)} | alone / it "
        f"(95%) | gap closed | recognised | copies | {name} | kernel × 1000 | "
        f"SSIM-rec@{config.evaluation.ssim_timestep} | best round | messages | core time |",
        "|---" * (11 + len(BANDS)) + "|",
    ]
    for side in _sides(asked):
        outcomes = [sides[side] for sides in seeds]
        owners = [list(outcome["owners"].values()) for outcome in outcomes]
        ratio = _ratio(_losses([sides[ALONE] for sides in seeds]), _losses(outcomes))

        def over(key: str, digits: int, factor: float = 1.0, *, of: Any = owners) -> str:
            values = [_mean_of([owner[key] for owner in one]) for one in of]
            known = [factor * value for value in values if value is not None]
            return mean_and_spread(known, digits) if known else "-"

        gaps = [gap for sides in seeds if (gap := gap_closed(sides, side)) is not None]
        rounds = sorted(owner["round"] for one in owners for owner in one)
        lines.append(
            f"| {side} | "
            + " | ".join(
                [
                    over("loss", 4),
                    *(over(band, 4) for band in BANDS),
                    f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                    mean_and_spread(gaps, 2) if gaps else "-",
                    over("recognised", 2),
                    over("copies", 2),
                    over("frechet", 2),
                    over("kernel", 2, 1000),
                    over("ssim", 3),
                    str(rounds[0]) if rounds[0] == rounds[-1] else f"{rounds[0]} to {rounds[-1]}",
                    bytes_in_words(outcomes[0]["bytes"]),
                    seconds_in_words(mean(outcome["core_seconds"] for outcome in outcomes)),
                ]
            )
            + " |"
        )
    waited = asked[0].judging.patience
    patience = f", or until none is the best for {waited} rounds" if waited else ""
    joined = [cell.config.federation for cell in asked if cell.config.training.control_variates]
    method = (
        f"together has control variates, and the server's step momentum "
        f"{joined[0].server_momentum:g}"
        if joined
        else "together was not asked for"
    )
    own = ", ".join(
        f"{cell.side} {cell.config.training.exclusive_learning_rate:g}"
        for cell in asked[: len(_sides(asked))]
    )
    lines += [
        "",
        f"{asked[0].owners}, {len(some['owners'])} owners with {some['images_per_owner']:g} "
        f"training images each, {config.data.validation_images} besides to choose rounds by, "
        f"{some['test_images']} test images at most; {some['asked_rounds']} rounds of "
        f"{config.training.local_steps} steps of {config.training.batch_size} images{patience}, "
        f"{len(seeds)} seed(s). Real images are recognised at a share of "
        f"{some['recognised_real']:.2f}; {some['samples']} samples an owner; copies: distance to "
        "training images over that of held-out ones. The interval is over held-out images, not "
        f"over trainings. φ learns at a rate of {config.training.learning_rate:g}, θ_i at: {own}; "
        f"{method}.",
    ]
    return "\n".join(lines) + "\n"


def mean_over_owners(outcome: Mapping[str, Any]) -> float:
    """The held-out loss of a side."""
    return float(mean(owner["loss"] for owner in outcome["owners"].values()))


def worth_of_images(points: Sequence[tuple[float, float]], loss: float) -> tuple[float, float]:
    """With how many images an owner alone comes to a loss, between which two bounds.

    Args:
        points: (images, loss) of owners alone.
        loss: to compare with.

    Returns:
        The same number twice, interpolated between logarithms; where no point lies on one side of
        the loss, 0 or infinity and the number that is known.
    """
    ordered = sorted(points)
    enough = next((place for place, (_, other) in enumerate(ordered) if other <= loss), None)
    if enough is None:
        return ordered[-1][0], math.inf
    if enough == 0:
        return 0, ordered[0][0]
    (fewer, worse), (more, better) = ordered[enough - 1], ordered[enough]
    part = math.log(worse / loss) / math.log(worse / better)
    found = fewer * (more / fewer) ** part
    return found, found


def describe_worth(
    asked: Sequence[Cell],
    outcomes: Sequence[dict[str, Any]],
    others: Sequence[Cell],
    of_others: Sequence[dict[str, Any]],
    out: Path,
) -> str:
    """Write images.csv, images.md and images.png: each side with its images beside owners alone
    with other numbers of them; returns the table.
    """
    by_count: dict[float, list[float]] = {}
    rows = []
    for cell, outcome in [*zip(asked, outcomes, strict=True), *zip(others, of_others, strict=True)]:
        if cell.side == ALONE:
            by_count.setdefault(outcome["images_per_owner"], []).append(mean_over_owners(outcome))
            rows.append(row_of(cell, outcome))
    write_csv(out / "images.csv", rows)
    points = sorted((count, mean(losses)) for count, losses in by_count.items())
    lines = ["| alone with | held-out loss |", "|---|---|"]
    lines += [f"| {c:g} images | {mean_and_spread(by_count[c], 4)} |" for c, _ in points]
    lines += ["", "| side | held-out loss | as good as alone with |", "|---|---|---|"]
    sides = [side for side in _sides(asked) if side != ALONE]
    lost = {
        side: [
            mean_over_owners(outcome)
            for cell, outcome in zip(asked, outcomes, strict=True)
            if cell.side == side
        ]
        for side in sides
    }
    for side, losses in lost.items():
        low, high = worth_of_images(points, mean(losses))
        told = f"{low:.0f}" if low == high else f"fewer than {high:g}"
        told = f"more than {low:g}" if math.isinf(high) else told
        lines.append(f"| {side} | {mean_and_spread(losses, 4)} | {told} images |")
    some = outcomes[0]
    line_plot(
        out / "images.png",
        {
            ALONE: ([count for count, _ in points], [loss for _, loss in points]),
            **{
                f"{side} with {some['images_per_owner']:g}": (
                    [points[0][0], points[-1][0]],
                    [mean(losses)] * 2,
                )
                for side, losses in lost.items()
            },
        },
        x_label="training images of an owner",
        y_label="held-out loss, mean over owners",
        title=f"{asked[0].owners}, {len(some['owners'])} owners",
        log_y=True,
    )
    text = "\n".join(lines) + "\n"
    write_bytes(out / "images.md", text.encode())
    return text


def _sides(asked: Sequence[Cell]) -> list[str]:
    return [side for side in SIDES if any(cell.side == side for cell in asked)]


def _losses(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Losses]:
    """By owner, image and moment, mean over outcomes that differ in the seed alone."""
    return {
        name: np.mean([outcome["owners"][name]["losses"] for outcome in outcomes], axis=0)
        for name in outcomes[0]["owners"]
    }


def _ratio(alone: Mapping[str, Losses], other: Mapping[str, Losses]) -> Ratio:
    return paired_ratio(list(alone.values()), [other[name] for name in alone], seed=0)


def _curve(outcomes: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    rounds = list(outcomes[0]["history"])
    return [float(number) for number in rounds], [
        mean(outcome["history"][number] for outcome in outcomes) for number in rounds
    ]


def _mean_of(values: Sequence[float | None]) -> float | None:
    """Mean over what is known, in as many digits as mean something."""
    known = [value for value in values if value is not None]
    return _digits(mean(known)) if known else None


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
