"""metrics.jsonl, TensorBoard, the table and the pictures say the same, and nothing twice."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srfed.diffusion.guidance import TaskDenoiser
from srfed.errors import DamagedError, UserError
from srfed.evaluation.task import evaluate_task, generate_share
from srfed.federation.flower.in_process import run_in_process as run_observed
from srfed.memory import memory_of_processes
from srfed.model import build_objective
from srfed.observer import Observer, Observers, Stage
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.console import Console
from srfed.reporting.curves import shown_on_terminal
from srfed.reporting.pace import Pace, comparison_passes, evaluation_passes, round_passes
from srfed.reporting.pictures import GAP, SMALLEST_CELL, draw_grid, write_png
from srfed.reporting.summary import summarise, totals
from srfed.reporting.values import evaluation_values
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.units import bytes_in_words, seconds_in_words
from srfed.work import COUNTS_VARIABLE, count_passes, counted_together, passes_done
from support.records import evaluation_record, round_record
from support.tiny_run import (
    CHEAP,
    begin,
    files_of_at_most,
    round_lines,
    run_in_process,
    tiny_config,
)

TASKS = [TaskInfo("client-b", "zebra", 1200, 40), TaskInfo("client-a", "ant", 30, 10)]


# --- metrics.jsonl -------------------------------------------------------------------------------


def test_records_come_back_as_they_were_written_without_pictures(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    log.add_round(round_record(1))
    log.add_evaluation(evaluation_record(1))
    assert log.tasks() == TASKS
    (line,) = log.rounds()
    assert line == {
        "kind": "round",
        **{name: value for name, value in vars(round_record(1)).items() if name != "lowered"},
        "loss_by_quarter": [0.1, 0.2, 0.3, None],
    }
    (line,) = log.evaluations()
    assert line["ssim"] == {"10": 0.99, "50": 0.875}
    assert not {"grids", "strips"} & set(line)
    assert all(json.loads(text) for text in log.path.read_text().splitlines())
    assert "NaN" not in log.path.read_text()


def test_going_on_drops_a_half_written_line_and_the_rounds_to_come(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    for number in (1, 2, 3):
        log.add_round(round_record(number))
        log.add_evaluation(evaluation_record(number))
    with log.path.open("a") as file:
        file.write('{"kind": "round", "round": 4, "lo')
    assert [line["round"] for line in log.rounds()] == [1, 2, 3]
    log.begin(2, TASKS)
    log.add_round(round_record(3, loss=0.125))
    assert [line["round"] for line in log.rounds()] == [1, 2, 3]
    assert log.rounds()[-1]["loss"] == 0.125
    assert [line["round"] for line in log.evaluations()] == [1, 2]
    assert len(log.path.read_text().splitlines()) == 1 + 3 + 2


def test_a_log_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl").add_round(round_record(1))


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (b"\xff\xfe", 2),
        (b"\0" * 9, 2),
        (b"12", 2),
        (b'{"kind": "round"}', 2),
        (b'{"kind": "news", "round": 1}', 2),
    ],
)
def test_a_line_that_is_none_of_ours_is_named(tmp_path: Path, line: bytes, number: int) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    with log.path.open("ab") as file:
        file.write(line)
    assert log.rounds() == [], "without an end it is what a crash has left"
    with log.path.open("ab") as file:
        file.write(b"\n")
    for read in (log.rounds, log.evaluations, log.tasks, lambda: log.begin(1, TASKS)):
        with pytest.raises(
            DamagedError, match=f"metrics.jsonl is damaged in line {number}; remove that line"
        ):
            read()


def test_a_log_says_its_format_and_one_of_a_newer_srfed_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    head = json.loads(log.path.read_text())
    assert head["format"] == 1
    log.path.write_text(json.dumps({**head, "format": 2}) + "\n")
    with pytest.raises(UserError, match="has format 2, which a newer srfed wrote"):
        log.tasks()
    log.path.write_text(json.dumps({key: head[key] for key in head if key != "format"}) + "\n")
    assert log.tasks() == TASKS


# --- The table -----------------------------------------------------------------------------------


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    log.add_round(round_record(1))
    log.add_round(round_record(2))
    log.add_evaluation(evaluation_record(2))
    return log


def test_the_table_shows_the_numbers_of_the_last_round_and_evaluation(log: MetricsLog) -> None:
    text = summarise(log, 75)
    assert cells(text, "task ") == ["images", "loss", "fd_embedded", "SSIM-rec@50"]
    assert cells(text, "zebra") == ["1,200", "0.7500", "20.500", "0.950"]
    assert cells(text, "ant") == ["30", "0.2500", "-", "0.800"]
    assert cells(text, "all tasks") == ["1,230", "0.5000", "12.346", "0.875"]
    assert text.index("zebra") < text.index("ant"), (
        "in the order of the data set, not of the alphabet"
    )
    assert "the real training images score 1.250" in text
    assert "12 samples to 50 held-out" in text
    assert "t=10: 0.990, t=50: 0.875" in text
    assert "2 rounds, 192 images; training 4s, evaluation 3s, this command 1m15s in all" in text
    assert "2.5 MB from the clients, 4.2 MB to them" in text
    sums = totals(log)
    assert (sums.rounds, sums.images, sums.bytes_up, sums.bytes_down) == (
        2,
        192,
        2_500_000,
        4_250_000,
    )


def test_a_table_of_many_tasks_has_their_quantiles(tmp_path: Path) -> None:
    """Each column by itself, over the tasks that have a value."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    clients = [f"c{i:03d}" for i in range(101)]
    log.begin(0, [TaskInfo(client, client, 10 + i, 4) for i, client in enumerate(clients)])
    losses = {client: 1 + i / 100 for i, client in enumerate(reversed(clients))}
    log.add_round(round_record(1, loss_by_client=losses))
    scores = dict(zip(clients[:3], (7.0, 5.0, 9.0), strict=True))
    log.add_evaluation(evaluation_record(1, score_by_client=scores, ssim_by_client={}))
    table = summarise(log, 1.0).splitlines()
    assert [line.split() for line in table[1:4]] == [
        ["least", "10", "1.0000", "5.000", "-"],
        ["median", "60", "1.5000", "7.000", "-"],
        ["greatest", "110", "2.0000", "9.000", "-"],
    ]
    assert table[4].split()[:3] == ["all", "tasks", "6,060"]
    assert "least, median and greatest of 101 tasks, of which 3 were judged" in "\n".join(table)


def test_the_table_of_a_run_without_evaluation_or_without_anything_is_short(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "none.jsonl")
    assert "0 rounds, 0 images" in summarise(log, 1)
    log.begin(0, TASKS)
    log.add_round(round_record(1))
    assert "1 rounds, 96 images" in summarise(log, 1)


def test_the_table_copes_with_switched_off_ssim_and_an_unknown_floor(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(0, TASKS)
    log.add_round(round_record(1, loss_by_client={"client-a": 0.25}))
    log.add_evaluation(evaluation_record(1, ssim={}, ssim_by_client={}, ssim_window=0, floor=None))
    text = summarise(log, 1)
    assert cells(text, "zebra") == ["1,200", "-", "20.500", "-"]
    assert cells(text, "all tasks")[-1] == "-"
    assert "brought back" not in text


def test_a_finished_runs_table_is_made_of_its_metrics(finished_run: RunFolder) -> None:
    log = MetricsLog(finished_run.metrics)
    text, last, evaluation = summarise(log, 1), log.rounds()[-1], log.evaluations()[-1]
    for task in log.tasks():
        assert cells(text, task.task) == [
            str(task.images),
            f"{last['loss_by_client'][task.client]:.4f}",
            f"{evaluation['score_by_client'][task.client]:.3f}",
            f"{evaluation['ssim_by_client'][task.client]:.3f}",
            f"{evaluation['recognised_by_client'][task.client]:.2f}",
        ]
    assert cells(text, "all tasks")[-1] == f"{evaluation['recognised']:.2f}"
    assert f"held-out real images: {evaluation['recognised_real']:.2f}" in text
    assert last["loss"] == pytest.approx(sum(last["loss_by_client"].values()) / 3)
    assert evaluation["ssim"]["5"] == pytest.approx(sum(evaluation["ssim_by_client"].values()) / 3)


# --- Pictures ------------------------------------------------------------------------------------


def test_a_grid_shows_every_image_at_its_place_beside_its_label() -> None:
    rows = {
        "a": np.full((3, 8, 8, 1), 10, np.uint8),
        "a longer label": np.stack([np.full((8, 8, 1), value, np.uint8) for value in (100, 200)]),
    }
    grid = draw_grid(rows)
    factor = SMALLEST_CELL // 8
    step = 8 * factor + GAP
    assert grid.dtype == np.uint8
    assert grid.shape[0] == 2 * step
    label = grid.shape[1] - 3 * step
    assert label > 14 * 5
    for row, column, value in ((0, 0, 10), (0, 2, 10), (1, 0, 100), (1, 1, 200), (1, 2, 255)):
        cell = grid[row * step : row * step + 8 * factor, label + column * step :][:, : 8 * factor]
        assert (cell == value).all(), (row, column)
    for row in (0, 1):
        text = grid[row * step : row * step + 8 * factor, :label]
        assert text.min() < 128, "a label in dark on white"
        assert text.max() == 255


def test_a_grid_keeps_colours_and_large_images_as_they_are() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 64, 48, 3), dtype=np.uint8)
    grid = draw_grid({"x": image})
    assert (grid[:64, -48 - GAP : -GAP] == image[0]).all()
    two_channels = draw_grid({"x": image[..., :2]})
    assert (two_channels[:64, -48 - GAP : -GAP] == image[0][..., :1]).all()


def test_a_grid_may_have_rows_without_images(tmp_path: Path) -> None:
    grid = draw_grid(
        {"x": np.zeros((2, 8, 8, 1), np.uint8), "none": np.zeros((0, 8, 8, 1), np.uint8)}
    )
    write_png(tmp_path / "new" / "grid.png", grid)
    assert (np.asarray(Image.open(tmp_path / "new" / "grid.png")) == grid).all()


# --- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3145728, "3.1 MB"),
        (2.5e9, "2.5 GB"),
        (7e12, "7.0 TB"),
    ],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert bytes_in_words(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (90000, "25h00m"),
    ],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words


class Shown:
    """What the loop does with a record: it is put on record, and then shown."""

    def __init__(self, run: RunFolder) -> None:
        self.log, self.tell = MetricsLog(run.metrics), Observers(shown_on_terminal(run))

    def begin(self, last_round: int, tasks: list[TaskInfo]) -> None:
        everybody, _ = self.log.begin(last_round, tasks)
        self.tell.on_begin(everybody, last_round)

    def on_round(self, record: RoundRecord) -> None:
        self.log.add_round(record)
        self.tell.on_round(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.tell.on_judged(record)
        self.log.add_evaluation(record)
        self.tell.on_evaluation(record)

    def close(self) -> None:
        self.tell.on_end()


# --- TensorBoard and the reporter
# ------------------------------------------------------------------


def accumulate(run: RunFolder) -> EventAccumulator:
    events = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(run: RunFolder, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in accumulate(run).Scalars(tag)}


def test_tensorboard_is_made_up_from_the_record_when_a_run_goes_on(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    """As where the process was killed between a line on record and its point."""
    copied = tmp_path / "copy"
    shutil.copytree(finished_run.path, copied)
    run = RunFolder.open(copied)
    before = accumulate(run)
    for file in run.tensorboard.iterdir():
        file.unlink()
    longer = run.config.federation.model_copy(update={"rounds": 4})
    run_in_process(run.reconfigure(run.config.model_copy(update={"federation": longer})))
    after = accumulate(run)
    for tag in before.Tags()["scalars"]:
        points = [(event.step, event.value) for event in after.Scalars(tag)]
        steps = [step for step, _ in points]
        assert len(set(steps)) == len(steps), f"{tag} has one value a step"
        assert points[: len(before.Scalars(tag))] == [
            (event.step, event.value) for event in before.Scalars(tag)
        ]
    for tag in ("samples", "reverse_process"):
        shown = {event.step: event.encoded_image_string for event in after.Images(tag)}
        assert {e.step: e.encoded_image_string for e in before.Images(tag)}.items() <= shown.items()


def test_pictures_that_a_killed_process_has_not_written_are_made_again(tmp_path: Path) -> None:
    """What ends a process before the pictures are written leaves no evaluation on record."""

    class Killed(Observer):
        def on_judged(self, record: EvaluationRecord) -> None:
            raise UserError("killed")

    run = begin(tmp_path / "run", {"federation.rounds": 1, "evaluation.samples": 6})
    with pytest.raises(UserError, match="killed"):
        run_observed(run, [Killed(), *shown_on_terminal(run)])
    assert MetricsLog(run.metrics).evaluations() == []
    run_in_process(run)
    assert len(MetricsLog(run.metrics).evaluations()) == 1
    assert (run.samples / "round-00001.png").exists()
    assert [event.step for event in accumulate(run).Images("samples")] == [1]


def test_every_number_of_a_run_is_a_curve_and_every_picture_is_there(
    finished_run: RunFolder,
) -> None:
    events = accumulate(finished_run)
    log = MetricsLog(finished_run.metrics)
    for tag, key in {
        "loss/mean": "loss",
        "speed/images_per_second": "images_per_second",
        "speed/seconds_per_round": "seconds",
        "traffic/bytes_up": "bytes_up",
        "traffic/bytes_down": "bytes_down",
        "optimisation/learning_rate": "learning_rate",
        "optimisation/shared_update_norm": "update_norm",
        "optimisation/client_disagreement": "disagreement",
    }.items():
        expected = {line["round"]: pytest.approx(line[key], rel=1e-5) for line in log.rounds()}
        assert {event.step: event.value for event in events.Scalars(tag)} == expected, tag
    of_evaluations = {
        "fd_embedded/all": "score",
        "fd_embedded/real_images": "floor",
        "recognised/all": "recognised",
        "recognised/real_images": "recognised_real",
    }
    for tag, key in of_evaluations.items():
        expected = {line["round"]: pytest.approx(line[key], rel=1e-5) for line in log.evaluations()}
        assert {event.step: event.value for event in events.Scalars(tag)} == expected, tag
    assert [event.step for event in events.Scalars("ssim_rec_4_steps/t=5")] == [2, 3]
    assert [event.step for event in events.Scalars("ssim_rec_4_steps/t=10")] == [3], (
        "the curve is for the end"
    )
    tags = set(events.Tags()["scalars"])
    for client in ("digit-0", "digit-1", "digit-2"):
        assert {f"loss_by_client/{client}", f"fd_embedded_by_client/{client}"} <= tags
        assert {f"ssim_rec_4_steps_by_client/{client}", f"recognised_by_client/{client}"} <= tags
    assert {f"loss_by_timestep/quarter_{quarter}" for quarter in (1, 2, 3, 4)} <= tags
    for tag in ("samples", "reverse_process"):
        shown = events.Images(tag)
        assert [image.step for image in shown] == [2, 3]
        name = {"samples": "round", "reverse_process": "reverse-process"}[tag]
        with Image.open(finished_run.samples / f"{name}-00003.png") as picture:
            assert (shown[-1].width, shown[-1].height) == picture.size
    (text,) = events.Tensors("config/text_summary")
    assert "    local_steps: 2" in text.tensor_proto.string_val[0].decode()


def test_going_on_takes_later_rounds_out_of_the_curves(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    first = Shown(run)
    first.begin(0, TASKS)
    for number in (1, 2, 3):
        first.on_round(round_record(number, loss=1.0))
    first.on_evaluation(evaluation_record(3))
    first.close()
    second = Shown(run)
    second.begin(1, TASKS)
    second.on_round(round_record(2, loss=2.0))
    second.close()
    assert scalars(run, "loss/mean") == {1: 1.0, 2: 2.0}
    assert [line["loss"] for line in round_lines(run)] == [1.0, 2.0]
    assert accumulate(run).Tags()["images"] == [] or not accumulate(run).Images("samples")


def test_the_reporter_prints_one_plain_line_a_round_and_names_who_was_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Shown(begin(tmp_path / "run", {"federation.rounds": 10}))
    reporter.begin(0, TASKS)
    capsys.readouterr()
    reporter.tell.on_progress("round 1", 1, 2)
    reporter.on_round(
        round_record(1, refused={"client-a": "it lies"}, missing={"client-b": "not connected"})
    )
    reporter.on_evaluation(evaluation_record(1))
    reporter.close()
    reporter.close()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith(
        "round  1/10  loss 1.0000 of 2 clients  48 images/s  up 1.0 MB  down 2.0 MB  left "
    )
    assert lines[1:3] == ["  refused client-a: it lies", "  missing client-b: not connected"]
    assert lines[3].startswith(
        "evaluation 1: fd_embedded 12.346 (12 samples; real training images 1.250)  SSIM-rec@50"
    )
    assert printed.err == ""


def test_curves_have_the_spread_over_the_owners_that_were_judged() -> None:
    scores = dict(zip("abcd", (3.0, 9.0, 4.5, 1.25), strict=True))
    record = evaluation_record(1, score_by_client=scores, ssim_by_client={"a": 0.5}, ssim_steps=4)
    found = evaluation_values(record)
    spread = {
        which: float(np.quantile(list(scores.values()), share))
        for which, share in (("least", 0), ("median", 0.5), ("greatest", 1))
    }
    assert {f"fd_embedded_over_owners/{which}": v for which, v in spread.items()}.items() <= (
        found.items()
    )
    assert found["ssim_rec_4_steps_by_client/a"] == 0.5
    assert not [name for name in found if name.startswith("ssim_rec_4_steps_over")], "of one owner"
    assert not [name for name in found if name.startswith(("ssim_rec/", "ssim_rec_by"))]


def test_an_evaluation_counts_as_made_only_if_it_is_the_one_that_is_due(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.rounds": 2})
    reporter = Shown(run)
    reporter.begin(0, TASKS)
    reporter.on_evaluation(evaluation_record(2, final=False))
    assert not reporter.log.has_evaluation(2, final=True), "the last round asks for the final one"
    reporter.on_evaluation(evaluation_record(1, final=False))
    assert reporter.log.has_evaluation(1, final=False)
    reporter.on_evaluation(evaluation_record(2, final=True))
    assert reporter.log.has_evaluation(2, final=True)
    reporter.close()


def test_a_run_directory_keeps_its_lineage_and_its_configuration(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"training.learning_rate": 1e-5})
    again = RunFolder.open(run.path)
    assert (again.lineage, again.config) == (run.lineage, run.config)
    assert again.config == tiny_config({"training.learning_rate": 1e-5})
    assert begin(tmp_path / "other").lineage != run.lineage


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_the_curves_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run")
    reporter = Shown(run)
    reporter.begin(0, TASKS)
    reporter.on_round(round_record(1))
    (events,) = run.tensorboard.iterdir()
    with files_of_at_most(events.stat().st_size):
        reporter.on_round(round_record(2))
        reporter.on_round(round_record(3))
        reporter.close()
    notices = [line for line in capsys.readouterr().err.splitlines() if "cannot write" in line]
    assert notices == [
        f"cannot write {run.tensorboard}: File too large; its curves end here, and the run goes on"
    ]
    assert [line["round"] for line in round_lines(run)] == [1, 2, 3]
    assert scalars(run, "loss/mean")[1] == 1.0


def test_curves_that_cannot_be_begun_are_the_users_to_mend(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.tensorboard.write_text("in the way")
    with pytest.raises(UserError, match=f"^cannot write {run.tensorboard}: "):
        Shown(run).begin(0, TASKS)


# --- The time left ------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling.sampler": "ancestral"},
        {"sampling.sampler": "dpm_solver"},
        {"evaluation.ssim_images": 0},
        {"evaluation.ssim_steps": None},
        {"evaluation.ssim_steps": 7},
        {
            "sampling.guidance": 0.5,
            "model.exclusive_stages": "none",
            "model.owned": ("vector",),
        },
    ],
)
def test_the_passes_of_an_evaluation_are_those_that_the_network_is_asked_for(
    changes: dict[str, Any], final: bool
) -> None:
    config = tiny_config({"diffusion.timesteps": 50, "federation.clients": 1, **changes})
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    asked = 0

    def denoiser(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += len(x)
        return torch.zeros_like(x)

    evaluation, both = config.evaluation, TaskDenoiser(denoiser, denoiser)
    process = build_objective(config, torch.device("cpu")).process
    evaluate_task(
        both,
        process,
        config,
        task="t",
        train=images,
        test=images[:5],
        generated=generate_share(
            both,
            process,
            config,
            task="t",
            shape=(8, 8, 1),
            samples=evaluation.samples if final else evaluation.samples_between,
        ),
        final=final,
    )
    assert asked == evaluation_passes(config, 1, final=final) > 0


class Clock:
    """The time and the passes that a pace is told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.passes = 0.0, 0
        patch.setattr("srfed.reporting.pace.time.monotonic", lambda: self.now)
        patch.setattr("srfed.reporting.pace.passes_done", lambda: self.passes)

    def go_on(self, seconds: float, passes: int = 0) -> None:
        self.now, self.passes = self.now + seconds, self.passes + passes


def test_the_time_left_counts_every_evaluation_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 2 s, evaluations of 10 s between and 40 s at the end, whose passes are in that
    proportion: 500 and 2,000.
    """
    evaluation = {"every": 2, "samples": 400, "samples_between": 100, "ssim_images": 0}
    config = tiny_config(
        {
            "federation.rounds": 6,
            **{f"evaluation.{key}": value for key, value in evaluation.items()},
        }
    )
    clock = Clock(monkeypatch)
    pace = Pace(config)
    pace.begin(TASKS, 0)
    assert pace.seconds_left() is None
    pace.start("round", 1)
    clock.go_on(1.0, 48)
    # A quarter of 2 x 2 steps of 16 images at three passes. 100 images of 5 steps between, 400 at
    # the end.
    assert pace.share() == 0.25
    assert pace.seconds_left() == pytest.approx(3 + 5 * 4 + (2 * 500 + 2000) / 48)
    clock.go_on(1.0, 144)
    pace.end_round(round_record(1))
    assert pace.seconds_left() == pytest.approx(5 * 2 + (2 * 500 + 2000) * 2 / 192)
    pace.start("round", 2)
    clock.go_on(2.0, 192)
    pace.end_round(round_record(2))
    pace.start("evaluation", 2)
    clock.go_on(4.0, 200)
    # Twice as slow as a round's passes: it tells so itself.
    assert pace.seconds_left() == pytest.approx(6 + 4 * 2 + 10 + 40)
    clock.go_on(6.0, 300)
    pace.end_evaluation(evaluation_record(2))
    assert pace.seconds_left() == pytest.approx(4 * 2 + 10 + 40)
    pace.start("round", 3)
    clock.go_on(2.0, 192)
    pace.end_round(round_record(3))
    assert pace.seconds_left() == pytest.approx(3 * 2 + 10 + 40)
    pace.begin(TASKS, 6)
    assert pace.seconds_left() == pytest.approx(40)
    pace.start("evaluation", 6, final=True)
    clock.go_on(10.0, 500)
    assert (pace.share(), pace.seconds_left()) == (0.25, pytest.approx(30))
    clock.go_on(30.0, 1500)
    pace.end_evaluation(evaluation_record(6, final=True))
    assert pace.seconds_left() == 0


def test_where_no_pass_is_counted_the_clients_that_have_answered_say_how_far_a_round_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    pace = Pace(tiny_config({"evaluation.every": 0, "federation.rounds": 1}))
    pace.begin(TASKS, 0)
    pace.start("round", 1)
    clock.go_on(30.0)
    assert (pace.share(), pace.seconds_left()) == (0.0, None)
    pace.hear(1, 2)
    assert pace.share() == 0.5
    pace.hear(2, 2)
    pace.hear(1, 2)
    assert pace.share() == 1.0, "validation follows, in the same round"


class Counted(Observer):
    """The passes of every stage of a run."""

    def __init__(self) -> None:
        self.passes: dict[str, int] = {}
        self._since = 0

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        self._since = passes_done()

    def on_round(self, record: RoundRecord) -> None:
        self.passes[f"round {record.round}"] = passes_done() - self._since

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.passes[f"evaluation {record.round}"] = passes_done() - self._since


def test_a_run_counts_the_passes_that_are_expected_of_it(tmp_path: Path) -> None:
    few = {"federation.rounds": 2, "federation.clients": 2, "data.images_per_task": 20}
    alone = {"federation.compare": "alone"}
    run = begin(tmp_path / "run", {**CHEAP, "evaluation.ssim_images": 1, **few, **alone})
    counted = Counted()
    run_observed(run, [counted])
    tasks = MetricsLog(run.metrics).tasks()
    of_round = round_passes(run.config, [task.images for task in tasks])
    of_evaluation = evaluation_passes(run.config, 2, final=True) + comparison_passes(
        run.config, [task.test_images for task in tasks]
    )
    assert (counted.passes["round 1"], counted.passes["round 2"]) == (of_round, of_round)
    assert counted.passes["evaluation 2"] == of_evaluation


def test_passes_of_other_processes_are_added_and_nothing_stays_of_them() -> None:
    before = passes_done()
    with counted_together():
        folder = Path(os.environ[COUNTS_VARIABLE])
        program = "from srfed.work import count_passes; count_passes(40); count_passes(2)"
        for _ in range(2):
            subprocess.run([sys.executable, "-c", program], check=True)
        count_passes(1)
        assert passes_done() == before + 2 * 42 + 1
    assert passes_done() == before + 1
    assert not folder.exists()
    assert COUNTS_VARIABLE not in os.environ


def test_memory_is_that_of_a_process_and_all_that_it_has_started() -> None:
    taken = 64 * 2**20
    program = f"taken = b'x' * {taken}; print(flush=True); input()"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    alone, processes = memory_of_processes()
    with subprocess.Popen(
        [sys.executable, "-c", inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together, more = memory_of_processes()
        child.communicate(b"\n")
    assert more == processes + 2
    assert taken < together - alone < 3 * taken


def test_where_the_system_tells_nothing_of_processes_there_is_no_memory(tmp_path: Path) -> None:
    assert memory_of_processes(proc=tmp_path) == (0, 0)


def test_off_a_terminal_a_minute_of_silence_ends_with_a_line_of_how_far_the_run_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    console = Console(tiny_config({"federation.rounds": 4, "evaluation.every": 0}))
    console.on_begin(TASKS, 0)
    said = []
    for seconds in (1, 58, 2, 58, 3):
        if seconds == 1:
            console.on_start("round", 1)
        clock.go_on(seconds, 24)
        console.on_progress("round 1", 1, 2)
        console.look()
        said.append(capsys.readouterr().out)
    assert [bool(text) for text in said] == [False, False, True, False, True]
    assert re.fullmatch(
        r"at round 1/4: 50%  1 of 2 clients  left \d+m\d\ds  memory [\d.]+ [MG]B\n", said[2]
    )
    console.on_round(round_record(1))
    console.on_end()
    console.on_end()
    last = capsys.readouterr().out.splitlines()
    assert last[0].startswith("round 1/4  loss")
    assert re.fullmatch(r"after 2m02s  memory at most about [\d.]+ [MG]B.*", last[1])
    assert len(last) == 2


def told_rounds(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO) -> list[str]:
    """The rounds of ten, 25 s each, that have a line; somebody is missing in the fifth."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys, "stdout", screen)
    console = Console(tiny_config({"federation.rounds": 10, "evaluation.every": 0}))
    console.on_begin(TASKS, 0)
    for number in range(1, 11):
        console.on_start("round", number)
        clock.go_on(25.0, 48)
        console.on_round(round_record(number, missing={"client-b": "gone"} if number == 5 else {}))
    console.on_end()
    return re.findall(r"round +(\d+)/10  loss", screen.getvalue())


def test_off_a_terminal_rounds_that_go_well_have_a_line_a_minute_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert told_rounds(monkeypatch, io.StringIO()) == ["1", "4", "5", "8", "10"]
    assert told_rounds(monkeypatch, Terminal()) == [str(number) for number in range(1, 11)]


def test_a_pipe_that_nobody_reads_is_noticed_after_a_round_without_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        clock = Clock(monkeypatch)
        monkeypatch.setattr(sys, "stdout", pipe)
        console = Console(tiny_config({"federation.rounds": 10, "evaluation.every": 0}))
        for number in (1, 2):
            clock.go_on(2.0, 48)
            console.on_round(round_record(number))
        assert os.read(reader, 1000).decode().count("\n") == 1, "the second has no line"
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            console.on_round(round_record(3))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_it_until_its_line_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, screen = Clock(monkeypatch), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    console = Console(tiny_config({"federation.rounds": 4, "evaluation.every": 0}))
    console.on_begin(TASKS, 0)
    console.on_start("round", 1)
    clock.go_on(30.0, 48)
    console.look()
    assert re.search(r"\rround 1/4  25% \|.*\| left \d+m\d\ds  memory", screen.getvalue())
    console.on_round(round_record(1))
    line = screen.getvalue().rpartition("\r")[2]
    assert line.startswith("round 1/4  loss")
    console.on_end()


def test_the_last_round_says_that_an_evaluation_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, clock = Shown(begin(tmp_path / "run", {"federation.rounds": 1})), Clock(monkeypatch)
    reporter.begin(0, TASKS)
    clock.go_on(600.0)
    reporter.on_round(round_record(1))
    reporter.close()
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("round")]
    assert not line.endswith("left 0s")


def test_the_time_left_of_a_run_that_goes_on_is_that_of_its_own_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Shown(begin(tmp_path / "run", {"federation.rounds": 11}))
    clock = Clock(monkeypatch)
    reporter.begin(8, TASKS)
    # Next to no time for a pass: what is left are two rounds, of ten minutes each.
    clock.go_on(600.0, 10**9)
    reporter.on_round(round_record(9))
    reporter.close()
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("round")]
    assert line.endswith("left 20m00s")
