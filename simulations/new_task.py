"""Does a trained core help a task that took no part? ``python -m simulations.new_task --dataset digits``.

A federation is trained on all classes but the last two. Each of these is then added to it with φ frozen, with φ
thawed at the new client, and from scratch, at equal steps and several numbers of images. Scores are against held-out
images of the new class; agreement is the share of the samples that the 3-nearest-neighbour judge, who knows all
classes, gives to it. Stopped, the study goes on where it was.
"""

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from simulations.study import change, mean_and_spread
from simulations.table1 import DATASETS, PRESETS, configuration
from srfed import simulate
from srfed.checkpoints.adapted_task import score_adaptation
from srfed.checkpoints.trained_run import TrainedRun
from srfed.command import run_command
from srfed.config import DataConfig, RunConfig
from srfed.data import Task, load_tasks, task_names
from srfed.errors import UserError
from srfed.evaluation.agreement import accuracy_on_real_images, class_agreement
from srfed.evaluation.features import load_feature_network
from srfed.evaluation.network import FeatureNetwork
from srfed.files import write_bytes
from srfed.reporting.plots import line_plot
from srfed.training.adaptation import MODES, Mode

NEW_TASKS = 2
WORDS: Mapping[str, str] = {"frozen": "φ frozen", "thawed": "φ thawed here", "scratch": "from scratch"}
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.new_task", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--data-dir", metavar="DIR", help="where the images are (data.dir)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of the federation; default: the preset's")
    parser.add_argument(
        "--images", nargs="+", default=["20", "50", "100", "all"], metavar="N",
        help="training images of the new task; all: as many as the smaller of the two has (20 50 100 all)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="local steps of each adaptation (600)")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="steps between two scores (100)")
    parser.add_argument("--samples", type=int, default=200, metavar="N", help="samples for each score (200)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1 (1)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/new-task-<dataset>-<preset>")
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options))


def _study(options: argparse.Namespace) -> None:
    if min(options.seeds, options.steps, options.every) < 1 or options.samples < 2:
        raise UserError("--seeds, --steps and --every must be at least 1, --samples at least 2")
    base = configuration(options.dataset, options.preset, options.data_dir, options.device)
    if options.rounds is not None:
        base = change(base, federation__rounds=options.rounds)
    names = task_names(base.data)
    known = len(names) - NEW_TASKS
    base = change(base, federation__clients=known)
    tasks = load_tasks(base.data, len(names))
    counts = _counts(options.images, tasks[known:])
    out = options.out or Path("runs") / f"new-task-{options.dataset}-{options.preset}"
    rows = _read(out / "scores.csv")
    evaluation = base.evaluation
    wanted = [
        (seed, task, count, mode)
        for seed in range(options.seeds)
        for task in tasks[known:]
        for count in counts
        for mode in MODES
    ]
    runs: dict[int, TrainedRun] = {}
    network: FeatureNetwork | None = None
    for seed, task, count, mode in tqdm(wanted, unit="adaptation", disable=None):
        key = _key(options, seed, task.name, count, mode)
        if any(all(str(row[name]) == str(value) for name, value in key.items()) for row in rows):
            continue
        if seed not in runs:
            runs[seed] = _federation(out / f"run-seed-{seed}", change(base, seed=seed))
            torch.set_num_threads(base.resources.client_cpus)
        run = runs[seed]
        network = network or load_feature_network(evaluation.feature_network, evaluation.inception_weights, run.device)
        few = Task(task.index, task.name, task.train[:count], task.test)
        curve = [
            {
                **key,
                **asdict(scored.point),
                "agreement": class_agreement(tasks, {task.name: scored.samples})[task.name],
                "rounds": run.round,
            }
            for scored in score_adaptation(
                run.config, run.shared, few, network, mode=mode, steps=options.steps, every=options.every,
                samples=options.samples, seed=seed,
            )
        ]  # fmt: skip
        rows += curve
        _write(out / "scores.csv", rows)
    mine = [row for row in rows if _is_mine(row, options, counts)]
    steps_plot, images_plot = out / "steps.png", out / "images.png"
    _plot(steps_plot, mine, "steps", f"a new task, {counts[-1]} images", lambda row: int(row["images"]) == counts[-1])
    _plot(images_plot, mine, "images", f"a new task, {options.steps} steps", lambda row: _is_last(row))
    text = describe(mine, counts, accuracy_on_real_images(tasks))
    write_bytes(out / "table.md", text.encode())
    print(text)
    print(f"every number and the plots: {out}")
