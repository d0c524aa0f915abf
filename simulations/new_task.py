"""Does a trained core help a task that took no part? ``python -m simulations.new_task --dataset
digits``.

A federation is trained on all classes but the last two. Each of these is then added to it with φ
frozen, with φ thawed at the new client, and from scratch, at equal steps and several numbers of
images. Scores are against held-out images of the new class; agreement is the share of the samples
that the 3-nearest-neighbour judge, who knows all classes, gives to it. Stopped, the study goes on
where it was.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from simulations.table1 import DATASETS, PRESETS, configuration
from srfed import simulate
from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.data import Task, load_tasks, task_names
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images, class_agreement
from srfed.files import read_json, write_bytes, write_json
from srfed.interrupts import run_command
from srfed.reporting.plots import line_plot
from srfed.runs.adapting import Point, read_points, score_adaptation, write_points
from srfed.runs.run import TrainedRun
from srfed.studies.cases import change, mean_and_spread
from srfed.training.adaptation import MODES, Mode

NEW_TASKS = 2
WORDS: Mapping[str, str] = {"frozen": "φ frozen", "thawed": "φ thawed", "scratch": "from scratch"}


@dataclass(frozen=True)
class NewTaskPoint(Point):
    """A point with the task it is of, and the judge's verdict."""

    task: str
    agreement: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m simulations.new_task", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--data-dir", metavar="DIR", help="where the images are (data.dir)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of the federation; default: the preset's"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=["20", "50", "100", "all"],
        metavar="N",
        help="training images of the new task; all: as many as the smaller of the two has (20 50 "
        "100 all)",
    )
    parser.add_argument(
        "--steps", type=int, default=600, metavar="N", help="local steps of each adaptation (600)"
    )
    parser.add_argument(
        "--every", type=int, default=100, metavar="N", help="steps between two scores (100)"
    )
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples for each score (200)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1 (1)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/new-task-<dataset>-<preset>"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options))


def _study(options: argparse.Namespace) -> None:
    if min(options.seeds, options.steps, options.every) < 1 or options.samples < 2:
        raise UserError("--seeds, --steps and --every must be at least 1, --samples at least 2")
    base = configuration(options.dataset, options.preset, options.data_dir, options.device)
    known = len(task_names(base.data)) - NEW_TASKS
    rounds = options.rounds or base.federation.rounds
    base = change(base, federation__clients=known, federation__rounds=rounds)
    tasks = load_tasks(base.data, known + NEW_TASKS)
    counts = _counts(options.images, tasks[known:])
    out = options.out or Path("runs") / f"new-task-{options.dataset}-{options.preset}"
    _claim(
        out,
        {
            name: getattr(options, name)
            for name in ("dataset", "preset", "steps", "every", "samples")
        },
        rounds,
    )
    wanted = list(itertools.product(range(options.seeds), tasks[known:], counts, MODES))
    points = read_points(out / "scores.csv", NewTaskPoint)
    with tqdm(wanted, unit="adaptation", disable=None) as bar:
        for seed, task, count, mode in bar:
            if any(
                (p.seed, p.task, p.images, p.mode) == (seed, task.name, count, mode) for p in points
            ):
                continue
            bar.set_postfix_str(f"{task.name}, {count} images, {mode}")
            run = _federation(out / f"run-seed-{seed}", change(base, seed=seed))
            points += _curve(
                run, tasks, replace(task, train=task.train[:count]), mode, seed, options
            )
            write_points(out / "scores.csv", points)
    points = [p for p in points if p.images in counts and p.seed < options.seeds]
    _plot_steps(out / "steps.png", [p for p in points if p.images == counts[-1]])
    last = [p for p in points if p.steps == options.steps]
    _plot_images(out / "images.png", last)
    text = describe(last, accuracy_on_real_images(tasks))
    write_bytes(out / "table.md", text.encode())
    print(text)
    print(f"every number and the plots: {out}")


def describe(points: Sequence[NewTaskPoint], accuracy: float) -> str:
    """The scores after the last step as a table in Markdown, with what they depend on."""
    some = points[0]
    lines = [
        "| images | " + " | ".join(WORDS[mode] for mode in MODES) + " | real training images |",
        "|---" * (len(MODES) + 2) + "|",
    ]
    for count in sorted({point.images for point in points}):
        cells = []
        for mode in MODES:
            chosen = [point for point in points if (point.images, point.mode) == (count, mode)]
            cells.append(
                f"{mean_and_spread([p.score for p in chosen])}, "
                f"{mean_and_spread([p.agreement for p in chosen], 2)}"
            )
        floor = mean(point.floor for point in points if point.images == count)
        lines.append(f"| {count} | " + " | ".join(cells) + f" | {floor:.3f} |")
    tasks = sorted({point.task for point in points})
    lines += [
        "",
        f"{some.score_name} (features {some.network_sha256[:8]}) against held-out images, and "
        f"agreement, after {some.steps} steps; means and standard deviations over the new tasks "
        f"{', '.join(tasks)} and {len({point.seed for point in points})} seed(s). {some.samples} "
        "samples for each score, "
        f"{' and '.join(str(n) for n in sorted({p.references for p in points}))} held-out images; "
        "few images bias the distance upwards, real ones' too. The judge is right on "
        f"{accuracy:.3f} of held-out real images.",
    ]
    return "\n".join(lines) + "\n"


def _counts(wanted: Sequence[str], tasks: Sequence[Task]) -> list[int]:
    """The numbers of images, ascending; raises UserError for one that is impossible."""
    most = min(len(task.train) for task in tasks)
    words = {"all": most, **{str(count): count for count in range(2, most + 1)}}
    for word in wanted:
        if word not in words:
            raise UserError(f"--images {word} is impossible; allowed: 2 to {most}, or all")
    return sorted({words[word] for word in wanted})


def _claim(out: Path, settings: dict[str, Any], rounds: int) -> None:
    """Say in the folder what its scores depend on; raises UserError where they depend on something
    else.
    """
    file, settings = out / "study.json", {**settings, "rounds": rounds}
    if not file.exists():
        write_json(file, settings)
    found = read_json(file, "rounds")
    changed = [
        f"{name}: {found.get(name)} -> {value}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{out} holds another study ({', '.join(changed)}); name another folder with --out"
        )


@lru_cache(maxsize=1)
def _federation(folder: Path, config: RunConfig) -> TrainedRun:
    """The run over the other tasks, trained as far as it still has to be."""
    if (folder / "run.json").exists():
        arguments = ["--resume", str(folder)]
    else:
        write_bytes(folder.with_suffix(".yaml"), config.to_yaml().encode())
        arguments = ["--config", str(folder.with_suffix(".yaml")), "--run-dir", str(folder)]
    code = simulate.main(arguments)
    if code:
        raise UserError(f"the federation of {folder} could not be trained")
    return TrainedRun(folder, config.resources)


def _curve(
    run: TrainedRun,
    tasks: Sequence[Task],
    task: Task,
    mode: Mode,
    seed: int,
    options: argparse.Namespace,
) -> list[NewTaskPoint]:
    evaluation = run.config.evaluation
    torch.set_num_threads(run.config.resources.client_cpus)
    return [
        NewTaskPoint(
            **asdict(scored.point),
            task=task.name,
            agreement=class_agreement(tasks, {task.name: scored.samples})[task.name],
        )
        for scored in score_adaptation(
            run.config,
            run.shared,
            task,
            load_feature_network(
                evaluation.feature_network, evaluation.inception_weights, run.device
            ),
            mode=mode,
            steps=options.steps,
            every=options.every,
            samples=options.samples,
            seed=seed,
        )
    ]


def _plot_steps(path: Path, points: Sequence[NewTaskPoint]) -> None:
    _plot(
        path,
        points,
        lambda p: p.steps,
        "local steps",
        f"A new task with {points[0].images} images",
        log_x=False,
    )


def _plot_images(path: Path, points: Sequence[NewTaskPoint]) -> None:
    _plot(
        path,
        points,
        lambda p: p.images,
        "training images",
        f"A new task after {points[0].steps} steps",
        log_x=True,
    )


def _plot(
    path: Path,
    points: Sequence[NewTaskPoint],
    over: Callable[[NewTaskPoint], int],
    x_label: str,
    title: str,
    *,
    log_x: bool,
) -> None:
    """Mean and standard deviation over new tasks and seeds, one line a mode."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    spread: dict[str, list[float]] = {}
    for mode in MODES:
        groups: dict[int, list[float]] = {}
        for point in points:
            if point.mode == mode:
                groups.setdefault(over(point), []).append(point.score)
        places = sorted(groups)
        series[WORDS[mode]] = (
            [float(place) for place in places],
            [mean(groups[place]) for place in places],
        )
        spread[WORDS[mode]] = [
            stdev(groups[place]) if len(groups[place]) > 1 else 0.0 for place in places
        ]
    line_plot(
        path,
        series,
        x_label=x_label,
        y_label=f"{points[0].score_name} against held-out images",
        title=title,
        log_x=log_x,
        log_y=True,
        spread=spread,
    )


if __name__ == "__main__":
    raise SystemExit(main())
