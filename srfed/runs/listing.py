"""Runs in a folder: how each stands, and its headline."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srfed.errors import UserError
from srfed.files import is_held, read_json
from srfed.records import Comparison
from srfed.storage.metrics_log import Line, MetricsLog
from srfed.storage.run_folder import LOCK, RunFolder


@dataclass(frozen=True)
class ListedRun:
    """One run of a list.

    Attributes:
        path: its folder.
        state: "running", "finished", "stopped", "begun" (no round yet) or "damaged".
        rounds: done and asked; of a damaged run 0 and 0.
        began: date and time, UTC; empty where it is not known.
        headline: its last scores in a few words, or what is damaged.
    """

    path: Path
    state: str
    rounds: tuple[int, int]
    began: str
    headline: str


def list_runs(folder: Path) -> list[ListedRun]:
    """Every run in a folder and below it, the oldest first; links are not followed.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that has runs in it, such as runs")
    return sorted(map(_listed, run_folders(folder)), key=lambda run: (run.began, run.path))


def run_folders(folder: Path) -> Iterator[Path]:
    """Every run in a folder, itself or below it; raises UserError where one cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for path, folders, names in os.walk(folder, onerror=refuse):
        if "run.json" in names:
            # A run's own folders hold thousands of attempts, and no other run.
            folders.clear()
            yield Path(path)


def _listed(path: Path) -> ListedRun:
    try:
        run, log = RunFolder.open(path), MetricsLog(path / "metrics.jsonl")
        rounds, evaluations = log.rounds(), log.evaluations()
        began = str(read_json(run.identity_file).get("began", ""))
        running = is_held(path / LOCK)
    except UserError as error:
        return ListedRun(path, "damaged", (0, 0), "", str(error))
    done, asked = rounds[-1]["round"] if rounds else 0, run.config.federation.rounds
    last = evaluations[-1] if evaluations else None
    finished = done >= asked and last is not None and last["final"]
    return ListedRun(
        path,
        "running" if running else "finished" if finished else "stopped" if rounds else "begun",
        (done, asked),
        began[:16].replace("T", " "),
        _headline(rounds, last),
    )


def _headline(rounds: list[Line], evaluation: Line | None) -> str:
    if evaluation is None:
        loss = rounds[-1]["loss"] if rounds else None
        return "" if loss is None else f"loss {loss:.4f}"
    score, floor = evaluation["score"], evaluation["floor"]
    words = [f"{evaluation['score_name']} {'-' if score is None else f'{score:.3f}'}"]
    if floor is not None:
        words[0] += f" (real {floor:.3f})"
    if (recognised := evaluation.get("recognised")) is not None:
        words.append(f"recognised {recognised:.0%}")
    verdicts = [
        Comparison(
            *(one[name] for name in ("alone", "together", "low", "high", "alone_round"))
        ).verdict
        for one in evaluation.get("comparisons", {}).values()
    ]
    if verdicts:
        words.append(f"joining pays for {verdicts.count('pays')} of {len(verdicts)}")
    copies = sum(bool(audit["fires"]) for audit in evaluation.get("audits", {}).values())
    if copies:
        words.append(f"{copies} copy")
    return ", ".join(words)
