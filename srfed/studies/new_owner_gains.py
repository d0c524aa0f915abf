"""What a new owner's sides come to: a row a cell, tables, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from srfed.evaluation.metrics.denoising_loss import BANDS, Losses, Ratio, paired_ratio
from srfed.files import write_bytes
from srfed.reporting.plots import line_plot
from srfed.studies.cases import mean_and_spread, run_jobs, write_csv
from srfed.studies.gains import SCORES, add_row
from srfed.studies.new_owner import SCRATCH, SIDES, NewOwnerCell
from srfed.units import bytes_in_words, seconds_in_words

Outcomes = Mapping[tuple[str, int, str, int], Mapping[str, Any]]
"""By the new owner's name, its number of images, the side and the seed."""
KEY = (
    "set",
    "owner",
    "images",
    "side",
    "seed",
    "config_hash",
    "core_every",
    "core_rounds",
    "core_patience",
    "steps",
    "steps_between",
    "patience",
    "samples",
    "test_images",
    "validation_images",
    "trained_owners",
    "all_owners",
    "images_read",
)
"""What a line of cells.csv is known by."""


def run_new_owners(
    asked: Sequence[NewOwnerCell], pool: Path, jobs: int, out: Path
) -> list[dict[str, Any]]:
    """Fit and judge what is missing; each cell is a line of ``out/cells.csv`` as soon as it is
    there. Raises UserError as :func:`srfed.studies.cases.run_jobs`.
    """
    by_folder = {cell.folder(pool): cell for cell in asked}
    return run_jobs(
        [cell.job(pool) for cell in asked],
        pool,
        jobs,
        lambda job, outcome: add_row(
            out / "cells.csv", row_of(by_folder[job.folder], outcome), KEY
        ),
    )


def row_of(cell: NewOwnerCell, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """One cell: what was fitted to what, and what was found."""
    adapting, core = cell.adapting, cell.core
    return {
        "set": core.owners,
        "owner": cell.name,
        "images": adapting.images,
        "side": cell.side,
        "seed": core.config.seed,
        "config_hash": outcome["fingerprint"][:12],
        "core_every": core.judging.every,
        "core_rounds": core.config.federation.rounds,
        "core_patience": core.judging.patience,
        "steps": adapting.steps,
        "steps_between": adapting.between,
        "patience": adapting.patience,
        "samples": adapting.samples,
        "test_images": outcome["judged_on"],
        "validation_images": outcome["validation_images"],
        "trained_owners": core.config.federation.clients,
        "all_owners": cell.everybody.federation.clients,
        "images_read": cell.everybody.data.images_per_task,
        "core_round": outcome["core_round"],
        "best_step": outcome["step"],
        "steps_taken": outcome["steps_taken"],
        **{key: _digits(outcome[key]) for key in ("validation", "loss", *BANDS)},
        **{key: None if outcome[key] is None else _digits(outcome[key]) for key in SCORES},
        "recognised_real": _digits(outcome["recognised_real"]),
        "trained_values": outcome["trained_values"],
        "values": outcome["values"],
        "bytes": outcome["bytes"],
        "core_seconds": round(outcome["core_seconds"], 1),
        "core_seconds_to_best": round(outcome["core_seconds_to_best"], 1),
    }


def report(asked: Sequence[NewOwnerCell], outcomes: Sequence[dict[str, Any]], out: Path) -> str:
    """Write owners.csv, curve.csv, curve.md and curve.png; returns the table."""
    found = {
        (cell.name, cell.adapting.images, cell.side, cell.core.config.seed): outcome
        for cell, outcome in zip(asked, outcomes, strict=True)
    }
    counts = sorted({images for _, images, _, _ in found})
    names = list(dict.fromkeys(name for name, _, _, _ in found))
    pairs = [(images, side) for images in counts for side in SIDES]
    write_csv(
        out / "owners.csv",
        [
            {"set": asked[0].core.owners, "owner": name, **_means(found, [name], images, side)}
            for name in names
            for images, side in pairs
        ],
    )
    rows = [_means(found, names, images, side) for images, side in pairs]
    write_csv(out / "curve.csv", [{"set": asked[0].core.owners, **row} for row in rows])
    line_plot(
        out / "curve.png",
        {
            side: (
                [float(images) for images in counts],
                [row["loss"] for row in rows if row["side"] == side],
            )
            for side in SIDES
        },
        x_label="training images of the new owner",
        y_label="held-out denoising loss, mean over new owners",
        title=f"{asked[0].core.owners}: {len(names)} new owners",
        log_x=True,
        log_y=True,
    )
    text = describe(asked, found)
    write_bytes(out / "curve.md", text.encode())
    return text


def describe(asked: Sequence[NewOwnerCell], found: Outcomes) -> str:
    """The sides in Markdown, with what the numbers depend on."""
    some, cell = next(iter(found.values())), asked[0]
    names = list(dict.fromkeys(name for name, _, _, _ in found))
    seeds = sorted({seed for _, _, _, seed in found})
    lines = [
        "| images | side | held-out loss | scratch / it (95%) | recognised | copies | best step | "
        "values trained | messages | core time |",
        "|---" * 10 + "|",
    ]
    for images in sorted({images for _, images, _, _ in found}):
        for side in SIDES:
            of_seed = [[found[name, images, side, seed] for name in names] for seed in seeds]

            def over(key: str, digits: int, *, of: Any = of_seed) -> str:
                known = [[one[key] for one in each if one[key] is not None] for each in of]
                means = [mean(each) for each in known if each]
                return mean_and_spread(means, digits) if means else "-"

            ratio = _ratio(found, names, images, side)
            steps = sorted(one["step"] for each in of_seed for one in each)
            first = of_seed[0][0]
            seconds = mean(one["core_seconds"] for each in of_seed for one in each)
            lines.append(
                f"| {images} | {side} | "
                + " | ".join(
                    [
                        over("loss", 4),
                        f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                        over("recognised", 2),
                        over("copies", 2),
                        str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}",
                        f"{first['trained_values']:,} of {first['values']:,}",
                        bytes_in_words(first["bytes"]) if first["bytes"] else "-",
                        seconds_in_words(seconds),
                    ]
                )
                + " |"
            )
    core, waited = cell.core.config, cell.adapting.patience
    patience = f" or until none is the best for {waited}," if waited else ""
    rounds = ", ".join(
        f"{side} {' and '.join(str(n) for n in sorted(numbers))}"
        for side in SIDES
        if side != SCRATCH
        and (numbers := {one["core_round"] for key, one in found.items() if key[2] == side})
    )
    lines += [
        "",
        f"{cell.core.owners}: {core.federation.clients} owners have trained; new: "
        f"{', '.join(names)}. {some['judged_on']} test images of each at most; "
        f"{some['validation_images']} beside the training images choose the step, of "
        f"{cell.adapting.steps},{patience} one look every {cell.adapting.between}; {len(seeds)} "
        f"seed(s). The cores are of their best rounds: {rounds}. Real images are recognised among "
        f"all owners' at a share of {mean(one['recognised_real'] for one in found.values()):.2f}; "
        f"{some['samples']} samples; copies: distance to training images over that of held-out "
        "ones. The interval is over held-out images, not over trainings. Messages: φ, once. Core "
        "time is of all steps taken.",
    ]
    return "\n".join(lines) + "\n"


def _means(found: Outcomes, names: Sequence[str], images: int, side: str) -> dict[str, Any]:
    """A row of some new owners: means over them and seeds, and the ratio with its interval."""
    chosen = [
        outcome for key, outcome in found.items() if key[0] in names and key[1:3] == (images, side)
    ]
    ratio = _ratio(found, names, images, side)
    known = {key: [one[key] for one in chosen if one[key] is not None] for key in SCORES}
    return {
        "images": images,
        "side": side,
        "seeds": len(chosen) // len(names),
        **{
            key: _digits(mean(one[key] for one in chosen)) for key in ("validation", "loss", *BANDS)
        },
        "scratch_over_it": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        **{key: _digits(mean(values)) if values else None for key, values in known.items()},
        "best_step": _digits(mean(one["step"] for one in chosen)),
        "trained_values": chosen[0]["trained_values"],
        "bytes": chosen[0]["bytes"],
        "core_seconds": round(mean(one["core_seconds"] for one in chosen), 1),
    }


def _ratio(found: Outcomes, names: Sequence[str], images: int, side: str) -> Ratio:
    def losses(of: str, name: str) -> Losses:
        seeds = [
            outcome["losses"] for key, outcome in found.items() if key[:3] == (name, images, of)
        ]
        mean_over_seeds: Losses = np.mean(seeds, axis=0)
        return mean_over_seeds

    return paired_ratio(
        [losses(SCRATCH, name) for name in names], [losses(side, name) for name in names], seed=0
    )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
