"""When does joining the federation pay, and how much should one share? ``python -m
simulations.when_it_pays``.

Curves over images per task, budget, depth k of the partition and learning rate of θ, against local
training (nothing shared) and C-DDPM (everything pooled); then changes to the method, one at a time.
Scores are against held-out images, and memorisation is counted. Every method sees the same number
of training images, with repetition.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from simulations.table1 import DATASETS, PRESETS, configuration
from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.interrupts import run_command
from srfed.reporting.plots import line_plot
from srfed.storage.metrics_log import MetricsLog
from srfed.studies.cases import (
    Case,
    Outcome,
    add_options,
    asked_seeds,
    by_name,
    change,
    mean_and_spread,
    row_of,
    run_cases,
    write_csv,
)

POOLED = {
    "training__method": "pooled",
    "model__exclusive_stages": "none",
    "model__task_embedding": "shared",
}
METHODS: Mapping[str, dict[str, Any]] = {
    "local training": {"model__exclusive_stages": "all"},
    "C-DDPM, pooled": POOLED,
    "federated, k=1": {"model__exclusive_stages": 1},
    "federated, k=2": {"model__exclusive_stages": 2},
    "federated, k=4": {"model__exclusive_stages": 4},
}
"""What is compared at every number of images."""


def ablations(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Changes to the federated method, each by itself."""
    rate, steps = config.training.learning_rate, config.training.local_steps or 0
    half = {"training__local_steps": steps // 2, "training__exclusive_steps": steps - steps // 2}
    return {
        "as it is": {},
        "batches halved, steps doubled": {
            "training__batch_size": config.training.batch_size // 2,
            "training__local_steps": steps * 2,
        },
        "batches doubled, steps halved": {
            "training__batch_size": config.training.batch_size * 2,
            "training__local_steps": steps // 2,
        },
        "rate of θ halved": {"training__exclusive_learning_rate": rate / 2},
        "rate of θ doubled": {"training__exclusive_learning_rate": rate * 2},
        "alternating phases": {"training__update": "alternating", **half},
        "task vector": {"model__owned": ("vector",)},
        "proximal term, μ = 0.01": {"training__proximal": 0.01},
        "rates of φ and θ doubled": {"training__learning_rate": 2 * rate},
        "server: plain average": {"federation__server_optimizer": "average"},
        "server: momentum, 0.5": {
            "federation__server_optimizer": "momentum",
            "federation__server_momentum": 0.5,
        },
        "server: average at rate 2": {
            "federation__server_optimizer": "average",
            "federation__server_learning_rate": 2.0,
        },
        "φ's moments reset": {"training__shared_moments": "reset"},
        "head starts at zero": {"model__zero_head": True},
        "half the local steps, twice the rounds": {
            "training__local_steps": steps // 2,
            "federation__rounds": config.federation.rounds * 2,
        },
        "cosine rate": {"training__learning_rate_schedule": "cosine"},
        "core never trained": {"training__update": "exclusive"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m simulations.when_it_pays", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument(
        "--images",
        nargs="+",
        default=["20", "50", "100", "all"],
        metavar="N",
        help="images a task (20 50 100 all)",
    )
    parser.add_argument("--rounds", type=int, default=16, help="rounds of each run (16)")
    parser.add_argument("--samples", type=int, default=1_000, help="samples to score (1000)")
    parser.add_argument(
        "--ablations-at",
        nargs="*",
        default=["50"],
        metavar="N",
        help="images a task for the ablations (50)",
    )
    parser.add_argument(
        "--changes",
        nargs="+",
        metavar="WORDS",
        help="ablations whose names hold any of these words",
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options), options.minutes)


def study_configuration(options: argparse.Namespace) -> RunConfig:
    """The configuration that the studies vary: scored four times on the way, for a curve over the
    budget.
    """
    return change(
        configuration(options.dataset, options.preset, options.data_dir, options.device),
        federation__rounds=options.rounds,
        evaluation__every=max(1, options.rounds // 4),
        evaluation__samples=500,
        evaluation__samples_between=500,
        training__minibatches="continued",
    )


def _study(options: argparse.Namespace) -> None:
    base = study_configuration(options)
    cases = []
    for seed in asked_seeds(options):
        for images in options.images:
            with_images = change(base, seed=seed, data__images_per_task=_number(images))
            for name, settings in METHODS.items():
                cases.append(
                    Case(
                        f"{images} images: {name}", change(with_images, **settings), options.samples
                    )
                )
        for images in options.ablations_at:
            with_images = change(base, seed=seed, data__images_per_task=_number(images))
            for name, settings in ablations(with_images).items():
                if options.changes and not any(words.lower() in name for words in options.changes):
                    continue
                cases.append(
                    Case(
                        f"ablation, {images} images: {name}",
                        change(with_images, **settings),
                        options.samples,
                    )
                )
    groups = by_name(run_cases(cases, options.pool, options.jobs))
    out = options.out or Path("runs") / f"when-it-pays-{options.dataset}-{options.preset}"
    write_csv(
        out / "scores.csv",
        [row_of(outcome) for outcomes in groups.values() for outcome in outcomes],
    )
    _plot_images(out, options.images, groups)
    for images in options.images:
        _plot_budget(out, images, groups, options.pool)
    text = describe(options.images, options.ablations_at, groups)
    write_bytes(out / "tables.md", text.encode())
    print(text)
    print(f"every number and the plots: {out}")


def describe(
    images: Sequence[str], ablations_at: Sequence[str], groups: Mapping[str, Sequence[Outcome]]
) -> str:
    """The tables in Markdown."""
    some = next(iter(groups.values()))[0]
    name = some.record["scores"][0]["name"]
    floors = {count: groups[f"{count} images: local training"][0].floor() for count in images}
    lines = [
        f"{name} against held-out images ({some.record['samples']:,} samples; all real training "
        f"images score {max(floors.values()):.3f}), agreement, and the share of samples nearer to "
        "a training image than held-out images allow (pixels):",
        "",
        "| images a task | " + " | ".join(METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    for count in images:
        cells = [_cell(groups[f"{count} images: {method}"]) for method in METHODS]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    for count in ablations_at:
        chosen = {n: o for n, o in groups.items() if n.startswith(f"ablation, {count} images: ")}
        lines += [
            "",
            f"| change, {count} images a task | {name} | agreement | SSIM-rec | share nearer |",
            "|---" * 5 + "|",
        ]
        for title, outcomes in chosen.items():
            rows = [row_of(outcome) for outcome in outcomes]
            star = f"ssim_rec@{outcomes[0].case.config.evaluation.ssim_timestep}"
            values = [
                [o.score() for o in outcomes],
                *([row[key] for row in rows] for key in ("agreement", star, "memorised_pixels")),
            ]
            lines.append(
                f"| {title.partition(': ')[2]} | "
                + " | ".join(mean_and_spread(v) for v in values)
                + " |"
            )
    return "\n".join(lines) + "\n"


def _cell(outcomes: Sequence[Outcome]) -> str:
    rows = [row_of(outcome) for outcome in outcomes]
    words = [mean_and_spread([outcome.score() for outcome in outcomes])]
    words += [f"{mean(row[key] for row in rows):.2f}" for key in ("agreement", "memorised_pixels")]
    return ", ".join(words)


def _plot_images(out: Path, images: Sequence[str], groups: Mapping[str, Sequence[Outcome]]) -> None:
    series: dict[str, tuple[list[float], list[float]]] = {}
    spread: dict[str, list[float]] = {}
    for method in METHODS:
        chosen = [groups[f"{count} images: {method}"] for count in images]
        per_task = [outcomes[0].record["images_per_task"] for outcomes in chosen]
        scores = [[outcome.score() for outcome in outcomes] for outcomes in chosen]
        series[method] = (per_task, [mean(values) for values in scores])
        spread[method] = [stdev(values) if len(values) > 1 else 0.0 for values in scores]
    name = next(iter(groups.values()))[0].record["scores"][0]["name"]
    line_plot(
        out / "images.png",
        series,
        x_label="training images a task",
        y_label=f"{name} against held-out images",
        title="Score against images a task, at one budget",
        log_x=True,
        log_y=True,
        spread=spread,
    )


def _plot_budget(
    out: Path, images: str, groups: Mapping[str, Sequence[Outcome]], pool: Path
) -> None:
    series: dict[str, tuple[list[float], list[float]]] = {}
    name = ""
    for method in METHODS:
        curves = [_curve(outcome, pool) for outcome in groups[f"{images} images: {method}"]]
        series[method] = (list(curves[0]), [mean(curve[x] for curve in curves) for x in curves[0]])
        name = groups[f"{images} images: {method}"][0].record["scores"][0]["name"]
    line_plot(
        out / f"budget-{images}.png",
        series,
        x_label="training images seen, with repetition",
        y_label=f"{name} against held-out images (500 samples)",
        title=f"Score against budget, {images} images a task",
        log_y=True,
    )


def _curve(outcome: Outcome, pool: Path) -> dict[float, float]:
    """Score by training images seen."""
    log = MetricsLog(outcome.case.folder(pool) / "metrics.jsonl")
    seen: dict[int, int] = {}
    total = 0
    for line in log.rounds():
        total += line["images"]
        seen[line["round"]] = total
    return {float(seen[line["round"]]): line["score"] for line in log.evaluations()}


def _number(images: str) -> int | None:
    if images == "all":
        return None
    if not images.isdecimal() or not int(images):
        raise UserError(f"images a task are {images!r}; allowed: 1 and more, or all")
    return int(images)


if __name__ == "__main__":
    raise SystemExit(main())
