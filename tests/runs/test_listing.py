"""``srfed runs``: every run of a folder, how it stands, and its headline."""

import shutil
from pathlib import Path

from srfed.records import Comparison
from srfed.runs.listing import list_runs
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.records import evaluation_record, round_record
from support.tiny_run import begin


def test_every_run_is_listed_with_its_state_and_headline(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(finished_run.path, folder / "study" / "finished")
    begin(folder / "begun")
    stopped = MetricsLog(begin(folder / "stopped").metrics)
    stopped.begin(0, [])
    stopped.add_round(round_record(1))
    running = begin(folder / "running")
    log = MetricsLog(running.metrics)
    log.begin(0, [])
    log.add_round(round_record(1))
    pays = Comparison(0.3, 0.2, 1.2, 1.8, 1)
    log.add_evaluation(evaluation_record(1, comparisons={"client-a": pays}, recognised=0.5))
    begin(folder / "damaged\x1b[2J").config_file.write_text("name: [")
    (folder / "notes").mkdir()
    with running.in_use():
        listed = {run.path.name: run for run in list_runs(folder)}
        done = run_here("runs", folder)
    assert {name: run.state for name, run in listed.items()} == {
        "finished": "finished",
        "begun": "begun",
        "stopped": "stopped",
        "running": "running",
        "damaged\x1b[2J": "damaged",
    }
    (*_, last) = MetricsLog(finished_run.metrics).evaluations()
    assert listed["finished"].rounds == (3, 3)
    assert listed["finished"].headline == (
        f"fd_embedded {last['score']:.3f} (real {last['floor']:.3f}), "
        f"recognised {last['recognised']:.0%}"
    )
    assert listed["running"].headline == (
        "fd_embedded 12.346 (real 1.250), recognised 50%, joining pays for 1 of 1"
    )
    assert listed["stopped"].headline == "loss 1.0000"
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert "study/finished" in done.stdout
    assert "is not valid YAML" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_folder_without_runs_and_no_folder_are_said(tmp_path: Path) -> None:
    assert run_here("runs", tmp_path).stdout == f"no run in {tmp_path}\n"
    done = run_here("runs", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: runs is no folder; name one that has runs in it, such as runs\n"
