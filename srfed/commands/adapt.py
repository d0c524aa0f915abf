"""Add an unseen task to a trained run: ``srfed adapt --run RUN --data FOLDER --images
500``.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srfed.commands.options import Parser
from srfed.interrupts import run_command

if TYPE_CHECKING:
    from srfed.data import Task
    from srfed.runs.adapting import Point
    from srfed.runs.run import TrainedRun, TrainedSite
    from srfed.training.adaptation import Adapted

ROW = 10
"""Samples in one row of a picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed adapt",
        description="Fit exclusive layers θ to a task that took no part in a run, on its owner's "
        "images alone. The run stays as it is. A second call goes on with the modes that are "
        "missing.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, metavar="RUN", help="the folder of a run, whose core φ is taken"
    )
    source.add_argument(
        "--store", type=Path, metavar="DIR", help="or a site's own store, <state-dir>/<client-id>"
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data", type=Path, metavar="PATH", help="the task's images: a folder or an .npz file"
    )
    data.add_argument("--task", metavar="NAME", help="or a task of the run's own data set")
    parser.add_argument(
        "--images", type=int, metavar="N", help="the first N training images; default: all"
    )
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="how many of these are set aside to choose a step by, 0, or 2 and more; default: the "
        "run's data.validation_images where at least as many are left to train on, else 0",
    )
    parser.add_argument(
        "--mode",
        choices=("frozen", "thawed", "scratch", "all"),
        default="frozen",
        help="frozen: θ alone (default); thawed: φ too, here only; scratch: everything, from the "
        "initialisation; all: one after the other",
    )
    parser.add_argument(
        "--steps", type=int, default=600, metavar="N", help="local steps (default 600)"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help="steps between two scores; default: a sixth of them"
    )
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples for each score (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training and samples (default 0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/adapted-<name of the task>"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _adapt(options))


def _adapt(options: argparse.Namespace) -> None:
    from srfed.config import load_config
    from srfed.errors import UserError
    from srfed.storage.run_folder import RunFolder

    for name, least in (("steps", 1), ("every", 1), ("samples", 2), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is impossible; allowed: {least} or more")
    every = options.every or -(-options.steps // 6)
    resources = load_config(None, [f"resources.device={options.device}"]).resources
    if options.run is not None:
        RunFolder.open(options.run)
    # Importing torch takes seconds: what is wrong with the options is said before.
    import torch
    from tqdm import tqdm

    from srfed.data.tasks import extents
    from srfed.evaluation.features.load import load_feature_network
    from srfed.reporting.pictures import draw_grid, write_png
    from srfed.runs.adapting import (
        AdaptationFolder,
        best_step,
        computed_here,
        images_hash,
        score_adaptation,
        tensors_hash,
    )
    from srfed.runs.run import TrainedRun, TrainedSite
    from srfed.training.adaptation import MODES, adaptation_config

    trained = (
        TrainedRun(options.run, resources)
        if options.store is None
        else TrainedSite(options.store, resources)
    )
    config = computed_here(trained.config, options.device, cuda=trained.device.type == "cuda")
    task = _task(options, trained)
    evaluation = config.evaluation
    network = load_feature_network(
        evaluation.feature_network, evaluation.inception_weights, trained.device
    )
    torch.set_num_threads(config.resources.client_cpus)
    core = tensors_hash(trained.shared)
    out: Path = options.out or Path("runs") / f"adapted-{task.name}"
    about = {
        "task": task.name,
        "core_sha256": core,
        "images_sha256": images_hash(task),
        "images": len(task.train),
        "steps": options.steps,
        "every": every,
        "samples": options.samples,
        "seed": options.seed,
        "network": network.identity,
    }
    modes = MODES if options.mode == "all" else (options.mode,)
    # What cannot work is found before the folder is made.
    own = {
        mode: adaptation_config(
            config,
            mode,
            images=len(task.train),
            steps=options.steps,
            every=every,
            seed=options.seed,
        )
        for mode in modes
    }
    with AdaptationFolder.held(out, about) as folder:
        print(
            f"{task.name}: {len(task.train)} training images and {len(task.test)} held out, of "
            f"{extents(task.shape)}; core of round {trained.round}, sha256 {core}"
        )
        if len(task.validation):
            print(f"{len(task.validation)} images besides choose the step")
        for mode in modes:
            if folder.has(mode, task.name):
                print(f"{mode}: finished already")
                continue
            curve = []
            with tqdm(
                total=options.steps, desc=mode, unit="step", disable=None, leave=False
            ) as bar:
                for scored in score_adaptation(
                    config,
                    trained.shared,
                    task,
                    network,
                    mode=mode,
                    steps=options.steps,
                    every=every,
                    samples=options.samples,
                    seed=options.seed,
                ):
                    curve.append(scored)
                    bar.update(scored.point.steps - bar.n)
                    point = scored.point
                    tqdm.write(
                        f"{mode:<8} step {point.steps:>5}  loss {point.loss:.4f}  "
                        + (f"validation {point.validation:.4f}  " if len(task.validation) else "")
                        + f"{point.score_name} {point.score:.3f}"
                    )
            best = best_step(curve)
            folder.add(own[mode], mode, task.name, curve)
            rows = {
                str(first): best.samples[first : first + ROW]
                for first in range(0, len(best.samples[:100]), ROW)
            }
            write_png(out / f"samples-{mode}.png", draw_grid(rows))
            print(f"{mode}: {_core_words(mode, core, tensors_hash(best.adapted.shared))}")
            print(f"  {_values_words(mode, best.adapted)}; kept: {_kept_words(best.point)}")
            print(
                f"  sample it: srfed sample --store {folder.store(mode, task.name)} --n "
                "64 --out grid.png"
            )
        _plot(out / "scores.png", folder.points, task.name)
        some = folder.points[-1]
        print(
            f"{some.score_name} of {some.samples} samples against {some.references} held-out "
            f"images; the {some.images} training images score {some.floor:.3f} ({network.name} "
            f"{network.sha256[:8]}, {network.resize_rule}; seed {options.seed})"
        )
        print(f"scores: {folder.scores}, {out / 'scores.png'}")


def _task(options: argparse.Namespace, trained: "TrainedRun | TrainedSite") -> "Task":
    """The new task, its images brought to the run's size and channels where all its tasks have the
    same, and as many of them as were asked for.
    """
    from srfed.data import (
        describe_contents,
        describe_own_images,
        load_own_task,
        load_task,
        task_names,
    )
    from srfed.data.images import CHANNELS
    from srfed.data.source import slugs
    from srfed.errors import UserError
    from srfed.runs.adapting import fitting_task, with_validation

    # How many of the images are used is said first, and then which of these are set aside.
    config = trained.config.data.model_copy(
        update={"images_per_task": None, "validation_images": 0}
    )
    if options.data is None:
        names = task_names(config)
        new = [name for name in names if name not in {task.task for task in trained.tasks}]
        if options.task not in new:
            raise UserError(
                f"--task {options.task} is no task that the run has not seen; allowed: "
                f"{', '.join(new)}"
            )
        task = load_task(config, names.index(options.task))
    else:
        heights, widths, channels = (set(extent) for extent in zip(*trained.shapes, strict=True))
        fitting = {
            "image_size": min(heights) if len(heights) == 1 and heights == widths else None,
            "channels": min(channels) if len(channels) == 1 and channels <= {*CHANNELS} else None,
        }
        name = slugs([options.data.resolve().stem])[0]
        config = config.model_copy(update=fitting)
        task = load_own_task(config, options.data, name)
        for line in [
            *describe_own_images(config, options.data),
            *describe_contents(config, [task]),
        ]:
            print(line)
    task = fitting_task(trained.shapes, task, options.images, name="--images")
    return with_validation(trained.config.data, task, options.validation, name="--validation")


def _core_words(mode: str, before: str, after: str) -> str:
    if before == after:
        return f"the core is unchanged (sha256 {after})"
    return (
        "a core of its own"
        if mode == "scratch"
        else f"the core has moved, here only (sha256 {after})"
    )


def _values_words(mode: str, adapted: "Adapted") -> str:
    sizes = [sum(t.numel() for t in part.values()) for part in (adapted.exclusive, adapted.shared)]
    trained = sizes[0] if mode == "frozen" else sum(sizes)
    return f"trained: {trained:,} of {sum(sizes):,} values"


def _kept_words(point: "Point") -> str:
    if math.isfinite(point.validation):
        return f"step {point.steps}, which has the least validation loss"
    return f"step {point.steps}, the last"


def _plot(path: Path, points: "Sequence[Point]", task: str) -> None:
    from srfed.reporting.plots import line_plot

    series = {
        mode: (
            [float(p.steps) for p in points if p.mode == mode],
            [p.score for p in points if p.mode == mode],
        )
        for mode in dict.fromkeys(point.mode for point in points)
    }
    some = points[0]
    line_plot(
        path,
        series,
        x_label="local steps",
        log_y=True,
        y_label=f"{some.score_name} against {some.references} held-out images ({some.samples} "
        "samples)",
        title=f"{task}, {some.images} training images",
    )
