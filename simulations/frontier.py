"""Score against what travels: ``python -m simulations.frontier --dataset digits``.

Two curves at one budget of training images: over the dial of the partition (none, io, 1, 2, 3,
all), and over the local steps a round, where more steps mean fewer rounds and so fewer bytes in
all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from simulations.table1 import DATASETS, PRESETS
from simulations.when_it_pays import study_configuration
from srfed.commands.options import Parser
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.interrupts import run_command
from srfed.reporting.plots import line_plot
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
from srfed.units import bytes_in_words

DIAL = ("none", "io", 1, 2, 3, "all")
FACTORS = (0.5, 1, 2, 4)
"""Local steps a round, as multiples of the configuration's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m simulations.frontier", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument(
        "--rounds", type=int, default=16, metavar="N", help="rounds at the usual local steps (16)"
    )
    parser.add_argument(
        "--samples", type=int, default=1_000, metavar="N", help="samples to score (1000)"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _frontier(options), options.minutes)


def _frontier(options: argparse.Namespace) -> None:
    base = study_configuration(options)
    steps = base.training.local_steps
    if steps is None or options.rounds < 4:
        raise UserError("the frontier needs training.local_steps and at least 4 rounds")
    cases = []
    for seed in asked_seeds(options):
        seeded = change(base, seed=seed)
        cases += [
            Case(f"share: {rule}", change(seeded, model__exclusive_stages=rule), options.samples)
            for rule in DIAL
        ]
        for factor in FACTORS:
            local, rounds = max(1, round(steps * factor)), max(1, round(options.rounds / factor))
            config = change(seeded, training__local_steps=local, federation__rounds=rounds)
            cases.append(Case(f"local steps: {local}", config, options.samples))
    groups = by_name(run_cases(cases, options.pool, options.jobs))
    out = options.out or Path("runs") / f"frontier-{options.dataset}-{options.preset}"
    write_csv(
        out / "scores.csv",
        [row_of(outcome) for outcomes in groups.values() for outcome in outcomes],
    )
    for kind, title, file in (
        ("share: ", "Score against bytes: the partition", "partition.png"),
        ("local steps: ", "Score against bytes: local steps a round", "local_steps.png"),
    ):
        chosen = {
            name.removeprefix(kind): found
            for name, found in groups.items()
            if name.startswith(kind)
        }
        series = {
            name: ([found[0].record["round_bytes"] / 1e6], [mean(o.score() for o in found)])
            for name, found in chosen.items()
        }
        spread = {
            name: [stdev(o.score() for o in found) if len(found) > 1 else 0.0]
            for name, found in chosen.items()
        }
        line_plot(
            out / file,
            series,
            x_label="megabytes in all, of all clients",
            y_label="Fréchet distance to held-out",
            title=title,
            spread=spread,
        )
    text = _describe(groups)
    write_bytes(out / "table.md", text.encode())
    print(text)
    print(f"every number and the plots: {out}")


def _describe(groups: dict[str, list[Outcome]]) -> str:
    lines = [
        "| | rounds | a client's bytes a round | bytes in all | Fréchet distance | agreement | "
        "SSIM-rec |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in groups.items():
        rows = [row_of(outcome) for outcome in outcomes]
        star = f"ssim_rec@{outcomes[0].case.config.evaluation.ssim_timestep}"
        record = outcomes[0].record
        lines.append(
            f"| {name} | {record['training']['rounds']} | "
            f"{bytes_in_words(rows[0]['bytes_per_client_and_round'])} | "
            f"{bytes_in_words(record['round_bytes'])} | "
            f"{mean_and_spread([o.score() for o in outcomes])} | "
            f"{mean_and_spread([r['agreement'] for r in rows])} | "
            f"{mean_and_spread([r[star] for r in rows])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
