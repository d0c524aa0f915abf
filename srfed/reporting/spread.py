"""Runs that differ in their seed, or in one setting: mean and spread of every score."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from srfed.reporting.comparison import measures_of
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A run of several.

    Attributes:
        path: its folder.
        value: of the swept setting; empty where none is swept.
        seed: its seed.
    """

    path: Path
    value: str
    seed: int


def spread_table(key: str, runs: Sequence[Trained]) -> list[str]:
    """A row for each value of the setting, with the mean of each score over its runs and their
    standard deviation (of a sample, so "-" of one run).

    Args:
        key: the swept setting; empty where none is.
        runs: at least one.
    """
    names, values = _scores(runs)
    title = key or "all runs"
    rows = [[title, "runs", *names]]
    for value in dict.fromkeys(run.value for run in runs):
        own = [number for number, run in enumerate(runs) if run.value == value]
        cells = [_mean_and_spread([values[name][number] for number in own]) for name in names]
        rows.append([value or "", str(len(own)), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in runs)))
    return [
        *lines,
        "",
        f"mean ± standard deviation over runs, each at its last round; seeds: {seeds}",
    ]


def spread_csv(key: str, runs: Sequence[Trained]) -> str:
    """A line for each run: the setting's value, the seed, the folder's name, and every score."""
    names, values = _scores(runs)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow([*([key] if key else []), "seed", "run", *names])
    for number, run in enumerate(runs):
        scores = [values[name][number] for name in names]
        table.writerow([*([run.value] if key else []), run.seed, str(run.path), *scores])
    return buffer.getvalue()


def _scores(runs: Sequence[Trained]) -> tuple[list[str], dict[str, Sequence[float | None]]]:
    """The scores' names, and of each the values by run."""
    logs = [MetricsLog(RunFolder.open(run.path).metrics) for run in runs]
    found = {measure.name: measure.values for measure in measures_of(logs)}
    return list(found), found


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f"{stdev(known):.2g}" if len(known) > 1 else "-"
    return f"{fmean(known):.4g} ± {spread}"
