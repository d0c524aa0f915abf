"""Runs beside each other: the settings that differ, and the scores with their intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from srfed.data.record import read_records
from srfed.errors import UserError
from srfed.records import ssim_name
from srfed.reporting.plots import Panel, interval_panels
from srfed.reporting.summary import totals
from srfed.storage.metrics_log import Line, MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.units import bytes_in_words, printable

CONFIDENCE = 0.95
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What runs are called in table and picture, whose columns are narrow."""


@dataclass(frozen=True)
class Difference:
    """A run's score less the first run's, mean over the owners that both have.

    Attributes:
        mean: of the owners' differences.
        low, high: its 95% interval by Student's t over the owners; None of fewer than two.
        owners: how many.
    """

    mean: float
    low: float | None
    high: float | None
    owners: int


@dataclass(frozen=True)
class Measure:
    """One score of every run.

    Attributes:
        name: what it is called.
        lower_is_better: which way is better.
        values: over all owners, by run; None where a run has none.
        differences: of each run but the first to the first; None where there is none.
    """

    name: str
    lower_is_better: bool
    values: Sequence[float | None]
    differences: Sequence[Difference | None]


@dataclass(frozen=True)
class ComparedRuns:
    """Everything that :func:`comparison_table` and :func:`draw_comparison` show.

    Attributes:
        runs: their folders' names.
        settings: of those that differ, the value by run; "-" where a run has no such setting.
        measures: the scores.
        costs: rounds, images and bytes, by run, in words.
        notes: what forbids or limits the comparison, a sentence each.
    """

    runs: Sequence[str]
    settings: Mapping[str, Sequence[str]]
    measures: Sequence[Measure]
    costs: Mapping[str, Sequence[str]]
    notes: Sequence[str]


def compare_runs(paths: Sequence[Path]) -> ComparedRuns:
    """Read runs, the first of which is what the others are compared with.

    Raises:
        UserError: they are fewer than two or too many, or one is none or damaged.
    """
    if not 2 <= len(paths) <= len(LETTERS):
        raise UserError(f"{len(paths)} runs cannot be compared; allowed: 2 to {len(LETTERS)}")
    runs = [RunFolder.open(path) for path in paths]
    logs = [MetricsLog(run.metrics) for run in runs]
    last = [next(iter(log.evaluations()[-1:]), None) for log in logs]
    return ComparedRuns(
        [str(path) for path in paths],
        _settings(runs),
        measures_of(logs),
        _costs(logs),
        _notes(runs, last),
    )


def comparison_table(compared: ComparedRuns) -> list[str]:
    """The lines of the table."""
    letters = LETTERS[: len(compared.runs)]
    lines = [
        f"{letter}  {printable(name)}" for letter, name in zip(letters, compared.runs, strict=True)
    ]
    differ = [(name, list(values)) for name, values in compared.settings.items()]
    lines += ["", *_grid("settings that differ", letters, differ or [("none", [])])]
    scores: list[tuple[str, list[str]]] = []
    for measure in compared.measures:
        better = "lower" if measure.lower_is_better else "higher"
        values = ["-" if value is None else f"{value:.4g}" for value in measure.values]
        scores.append((f"{measure.name} ({better} is better)", values))
        scores += [
            (f"  {letter} - A: {_in_words(found, letter, measure.lower_is_better)}", [])
            for letter, found in zip(letters[1:], measure.differences, strict=True)
            if found is not None
        ]
    scores += [(name, list(values)) for name, values in compared.costs.items()]
    return [*lines, "", *_grid("score", letters, scores), "", *compared.notes]


def draw_comparison(path: Path, compared: ComparedRuns) -> None:
    """Draw each measure's differences to the first run with their intervals, a panel each, as PNG.

    Raises:
        UserError: no two runs have a score of an owner in common, or the file cannot be written.
    """
    panels = [
        Panel(
            f"{measure.name}, less that of A ({'left' if measure.lower_is_better else 'right'} of "
            "0 is better)",
            [
                None
                if found is None
                else (
                    found.mean if found.low is None else found.low,
                    found.mean,
                    found.mean if found.high is None else found.high,
                )
                for found in measure.differences
            ],
        )
        for measure in compared.measures
        if any(measure.differences)
    ]
    if not panels:
        raise UserError(
            f"{path} is not drawn: no run has a score of an owner that {compared.runs[0]} has too"
        )
    interval_panels(path, panels, LETTERS[1 : len(compared.runs)], level=0.0)


def paired_difference(
    first: Mapping[str, float | None], other: Mapping[str, float | None]
) -> Difference | None:
    """How much more the other has, over the owners that both have; None where there are none."""
    differences = [
        theirs - ours
        for owner, ours in first.items()
        if ours is not None and (theirs := other.get(owner)) is not None
    ]
    if not differences:
        return None
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, None, None, count)
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def _settings(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    settings = [run.config.settings() for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {
        name: [json.dumps(each[name]) if name in each else "-" for each in settings]
        for name in names
    }
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def measures_of(logs: Sequence[MetricsLog]) -> list[Measure]:
    """Every score that one of these runs has at its last round or evaluation, of all of them."""
    last = [next(iter(log.evaluations()[-1:]), None) for log in logs]
    rounds = [next(iter(log.rounds()[-1:]), None) for log in logs]
    found = [
        _measure("training loss", True, rounds, lambda line: line["loss"], "loss_by_client"),
        *(
            _measure(
                name,
                True,
                [line if line and line["score_name"] == name else None for line in last],
                lambda line: line["score"],
                "score_by_client",
            )
            for name in dict.fromkeys(line["score_name"] for line in last if line)
        ),
        *(
            _measure(
                name,
                False,
                [line if line and _ssim_of(line) == name else None for line in last],
                lambda line: line["ssim"].get(str(line["ssim_timestep"])),
                "ssim_by_client",
            )
            for name in dict.fromkeys(_ssim_of(line) for line in last if line)
        ),
        _measure(
            "recognised",
            False,
            last,
            lambda line: line.get("recognised"),
            "recognised_by_client",
        ),
        _measure(
            "loss alone / together",
            False,
            [_with_ratios(line) for line in last],
            _mean_ratio,
            "ratios",
        ),
    ]
    return [one for one in found if any(value is not None for value in one.values)]


def _measure(
    name: str,
    lower_is_better: bool,
    lines: Sequence[Line | None],
    value: Any,
    by_client: str,
) -> Measure:
    owners = [{} if line is None else line.get(by_client, {}) for line in lines]
    return Measure(
        name,
        lower_is_better,
        [None if line is None else value(line) for line in lines],
        [paired_difference(owners[0], other) for other in owners[1:]],
    )


def _ssim_of(line: Line) -> str:
    return ssim_name(line["ssim_timestep"], line.get("ssim_steps"))


def _with_ratios(line: Line | None) -> Line | None:
    compared = {} if line is None else line.get("comparisons", {})
    ratios = {client: one["ratio"] for client, one in compared.items() if one["ratio"]}
    return {"ratios": ratios} if ratios else None


def _mean_ratio(line: Line) -> float:
    ratios = line["ratios"].values()
    return math.exp(fmean(math.log(ratio) for ratio in ratios))


def _costs(logs: Sequence[MetricsLog]) -> dict[str, list[str]]:
    sums = [totals(log) for log in logs]
    return {
        "rounds": [f"{one.rounds:,}" for one in sums],
        "training images seen": [f"{one.images:,}" for one in sums],
        "bytes from the owners": [bytes_in_words(one.bytes_up) for one in sums],
        "bytes to them": [bytes_in_words(one.bytes_down) for one in sums],
    }


def _notes(runs: Sequence[RunFolder], last: Sequence[Line | None]) -> list[str]:
    letters = LETTERS[: len(runs)]
    notes = []
    unfinished = [
        letter
        for letter, line in zip(letters, last, strict=True)
        if line is None or not line["final"]
    ]
    if unfinished:
        notes.append(f"not finished, so not at its end: {', '.join(unfinished)}")
    if len({run.config.diffusion.prediction for run in runs}) > 1:
        notes.append("training losses of different diffusion.prediction are of different things")
    known = [line for line in last if line]
    if len({(line["samples"], line["references"]) for line in known}) > 1:
        counts = ", ".join(
            f"{letter} {line['samples']} to {line['references']}"
            for letter, line in zip(letters, last, strict=True)
            if line
        )
        notes.append(
            f"Fréchet distances of other numbers of images differ for that alone ({counts}): "
            "srfed evaluate scores each run on as many"
        )
    if len({_ssim_of(line) for line in known if line["ssim"]}) > 1:
        ways = ", ".join(
            f"{letter} {_ssim_of(line)}"
            for letter, line in zip(letters, last, strict=True)
            if line and line["ssim"]
        )
        notes.append(
            f"SSIM-rec that was made otherwise is another quantity ({ways}): srfed evaluate "
            "--ssim-steps makes it of each run in as many steps"
        )
    records = [read_records(run.images) for run in runs]
    if any(one and records[0] and one != records[0] for one in records[1:]):
        notes.append("the runs were begun with other images, or with others held out")
    notes.append(
        f"intervals: {CONFIDENCE:.0%}, over the owners that both runs have, not over trainings; "
        "another seed may differ as much"
    )
    return notes


def _in_words(found: Difference, letter: str, lower_is_better: bool) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.4g} (1 owner, so no interval)"
    words = f"{found.mean:+.4g} ({found.low:+.4g} to {found.high:+.4g}; {found.owners} owners): "
    if found.low <= 0 <= found.high:
        return f"{words}it is open"
    return f"{words}{letter if (found.mean < 0) == lower_is_better else 'A'} is better"


def _grid(title: str, letters: str, rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Columns by run under their letters; a row without values is as long as it likes."""
    filled = [values for _, values in rows if values]
    widths = [
        max([len(letter), *(len(values[column]) for values in filled)])
        for column, letter in enumerate(letters)
    ]
    first = max([len(title), *(len(name) for name, values in rows if values)])
    return [
        "  ".join(
            [f"{name:<{first}}", *(f"{v:>{w}}" for v, w in zip(values, widths, strict=False))]
        ).rstrip()
        for name, values in [(title, list(letters)), *rows]
    ]
