"""``srfed compare``: settings that differ, and scores with intervals over the same owners."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from srfed.errors import UserError
from srfed.records import Comparison, TaskInfo
from srfed.reporting.comparison import compare_runs, comparison_table, paired_difference
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.records import evaluation_record, round_record
from support.tiny_run import begin

TASKS = [TaskInfo("client-b", "zebra", 1200, 40), TaskInfo("client-a", "ant", 30, 10)]


def made(path: Path, changes: dict[str, Any], **evaluation: Any) -> Path:
    """A run's folder with one round and one evaluation."""
    log = MetricsLog(begin(path, changes).metrics)
    log.begin(0, TASKS)
    log.add_round(round_record(1))
    log.add_evaluation(evaluation_record(1, **evaluation))
    return path


def test_the_interval_is_students_over_paired_owners() -> None:
    first = {"a": 1.0, "b": 5.0, "c": 2.0, "d": None, "e": 7.0}
    other = {"a": 1.5, "b": 5.4, "c": 2.9, "d": 1.0, "f": 3.0}
    found = paired_difference(first, other)
    pairs = [first[owner] for owner in "abc"], [other[owner] for owner in "abc"]
    expected = stats.ttest_rel(pairs[1], pairs[0]).confidence_interval(0.95)
    assert found is not None
    assert found.owners == 3
    assert found.mean == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None
    assert paired_difference({"a": 1.0}, {"a": 2.0}).low is None  # type: ignore[union-attr]


def test_a_table_has_what_differs_and_who_is_better(tmp_path: Path) -> None:
    compared = {"client-a": Comparison(0.4, 0.2, 1.5, 2.5, 1)}
    first = made(
        tmp_path / "first", {}, final=True, score_by_client={"client-a": 9.0, "client-b": 4.0}
    )
    other = made(
        tmp_path / "other",
        {"federation.rounds": 7},
        score=1.5,
        score_by_client={"client-a": 6.0, "client-b": 1.2},
        comparisons=compared,
        samples=99,
    )
    lines = comparison_table(compare_runs([first, other]))
    text = "\n".join(lines)
    assert lines[0] == f"A  {first}"
    (differs,) = [line.split() for line in lines if line.startswith(("federation", "training."))]
    assert differs == ["federation.rounds", "3", "7"]
    (score,) = [line.split() for line in lines if line.startswith("fd_embedded")]
    assert score[-2:] == ["12.35", "1.5"]
    assert "  B - A: -2.9 (-4.171 to -1.629; 2 owners): B is better" in text
    assert "  B - A: +0 (+0 to +0; 2 owners): it is open" in text, "SSIM and loss are the same"
    (ratio,) = [line.split() for line in lines if line.startswith("loss alone / together")]
    assert ratio[-2:] == ["-", "2"]
    assert "not finished, so not at its end: B" in text
    assert "(A 12 to 50, B 99 to 50)" in text


def test_scores_under_other_names_are_not_mixed(tmp_path: Path) -> None:
    first = made(tmp_path / "first", {})
    other = made(tmp_path / "other", {}, score_name="fid", ssim_timestep=10)
    measures = {one.name: one for one in compare_runs([first, other]).measures}
    assert measures["fd_embedded"].values == [12.3456, None]
    assert measures["fid"].values == [None, 12.3456]
    assert measures["fid"].differences == [None]
    assert measures["SSIM-rec@10"].values == [None, 0.99]


def test_ssim_of_other_ways_is_not_mixed(tmp_path: Path) -> None:
    """A run of before there were steps, one by Algorithm 2, and one in four steps."""
    paths = [made(tmp_path / "first", {"evaluation.ssim_steps": None})]
    log = MetricsLog(paths[0] / "metrics.jsonl").path
    log.write_text(log.read_text().replace(', "ssim_steps": null', ""))
    paths.append(made(tmp_path / "second", {"evaluation.ssim_steps": None}))
    paths.append(made(tmp_path / "third", {}, ssim_steps=4))
    compared = compare_runs(paths)
    measures = {one.name: one for one in compared.measures}
    assert measures["SSIM-rec@50"].values == [0.875, 0.875, None]
    assert measures["SSIM-rec@50 (4 steps)"].values == [None, None, 0.875]
    assert measures["SSIM-rec@50 (4 steps)"].differences == [None, None]
    assert compared.settings["evaluation.ssim_steps"] == ["null", "null", "4"]
    (note,) = [note for note in compared.notes if "SSIM" in note]
    assert "(A SSIM-rec@50, B SSIM-rec@50, C SSIM-rec@50 (4 steps))" in note
    assert not [note for note in compare_runs(paths[:2]).notes if "SSIM" in note]


def test_the_command_prints_the_table_and_draws_it(finished_run: RunFolder, tmp_path: Path) -> None:
    same = Path(shutil.copytree(finished_run.path, tmp_path / "same"))
    done = run_here("compare", finished_run.path, same, "--out", "two.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "settings that differ  A  B\nnone\n" in done.stdout
    assert "over the owners that both runs have" in done.stdout
    assert "other images" not in done.stdout
    picture = np.asarray(Image.open(tmp_path / "two.png").convert("L"))
    assert np.ptp(picture) > 200
    # A folder of runs, as seeds are, stands for them.
    whole = run_here("compare", tmp_path, "--out", "one.png", folder=tmp_path)
    assert whole.returncode == 2
    assert "1 runs cannot be compared" in whole.stderr
    shutil.copytree(same, tmp_path / "seeds" / "seed-1")
    whole = run_here("compare", finished_run.path, tmp_path / "seeds", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"^B +.*seeds/seed-1$", whole.stdout, re.MULTILINE)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {})
    empty = begin(tmp_path / "empty").path
    with pytest.raises(UserError, match=r"^1 runs cannot be compared; allowed: 2 to 26$"):
        compare_runs([run])
    done = run_here("compare", run, empty, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: comparison.png is not drawn: no run has a score of an")
    assert not (tmp_path / "comparison.png").exists()
