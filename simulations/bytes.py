"""Score against bytes, both ways: ``nice -n 10 python -m simulations.bytes --seeds 3``.

The default digits at one number of local steps in all, in rounds of 8, 16, 48 and 144 of them, and
with what travels as float32, in 8 bits both ways, or in 4 bits up and 8 down. Bytes are those of
the training rounds' messages, headers included; an evaluation is not counted. Stopped, it goes on
where it was.

    cells.csv            a line for each run, as soon as it has ended
    table.md, bytes.png  at the end
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.interrupts import run_command
from srfed.paths import absolute_path
from srfed.reporting.plots import line_plot
from srfed.runs.requested import refuse_ignored_dir
from srfed.storage.metrics_log import MetricsLog
from srfed.studies.cases import (
    Case,
    Outcome,
    add_options,
    asked_seeds,
    change,
    mean_and_spread,
    row_of,
    run_cases,
)
from srfed.studies.gains import add_row
from srfed.units import bytes_in_words

LOCAL_STEPS = (8, 16, 48, 144)
TRAVELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "32": ("float32", {}),
    "8": ("8 bits", {"updates__steps": ("quantise",), "updates__shared_bits": 8}),
    "4": (
        "4 bits up, 8 down",
        {
            "updates__steps": ("quantise",),
            "updates__quantise_bits": 4,
            "updates__shared_bits": 8,
        },
    ),
}
"""What travels, by its bits on the way up: its name, and the settings that make it so."""
KEY = ("name", "training_seed", "config_hash", "n", "rounds")
"""What a line of cells.csv is known by."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m simulations.bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, default=432, metavar="N", help="local steps in all (432)"
    )
    parser.add_argument(
        "--local-steps",
        type=int,
        nargs="+",
        default=LOCAL_STEPS,
        metavar="N",
        help=f"of a round; each divides --steps ({' '.join(map(str, LOCAL_STEPS))})",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        choices=list(TRAVELS),
        default=list(TRAVELS),
        help="of what goes up: 32 and 8 both ways, 4 with 8 down (32 8 4)",
    )
    parser.add_argument(
        "--samples", type=int, default=1_000, metavar="N", help="samples to score (1000)"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options), options.minutes)


def cells(options: argparse.Namespace) -> list[Case]:
    """The cases of the study, a seed after the other; raises UserError where they are
    impossible.
    """
    base = change(
        RunConfig(),
        name="bytes",
        data__dir="" if options.data_dir is None else str(absolute_path(options.data_dir)),
        # The study scores each run at its end itself.
        evaluation__every=0,
        evaluation__samples=20,
        evaluation__samples_between=20,
        evaluation__ssim_images=0,
        resources__backend="inline",
        resources__device=options.device,
    )
    refuse_ignored_dir(base)
    found = []
    for seed in asked_seeds(options):
        for local in options.local_steps:
            if local < 1 or options.steps < local or options.steps % local:
                raise UserError(
                    f"--local-steps {local} is impossible; allowed: what divides --steps "
                    f"{options.steps}"
                )
            for bits in options.bits:
                name, settings = TRAVELS[bits]
                config = change(
                    base,
                    seed=seed,
                    training__local_steps=local,
                    federation__rounds=options.steps // local,
                    **settings,
                )
                found.append(Case(f"{name}, {local} steps a round", config, options.samples))
    return found


def row(outcome: Outcome, pool: Path) -> dict[str, Any]:
    """One line of cells.csv."""
    config = outcome.case.config
    rounds = MetricsLog(outcome.case.folder(pool) / "metrics.jsonl").rounds()
    return {
        **row_of(outcome),
        "travels": outcome.case.name.rpartition(", ")[0],
        "local_steps": config.training.local_steps,
        "rounds": config.federation.rounds,
        **{key: sum(line[key] for line in rounds) for key in ("bytes_up", "bytes_down")},
    }


def report(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Write the table and the picture of the lines of cells.csv; returns the table."""
    groups: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for one in rows:
        groups.setdefault(one["travels"], {}).setdefault(one["local_steps"], []).append(one)
    lines = [
        "| travels | local steps | rounds | up | down | Fréchet distance | recognised |",
        "|---|---|---|---|---|---|---|",
    ]
    series, spread = {}, {}
    for travels, found in groups.items():
        points = []
        for local, seeds in sorted(found.items()):
            up, down = (mean(one[key] for one in seeds) for key in ("bytes_up", "bytes_down"))
            scores = [float(one["score_test"]) for one in seeds]
            deviation = stdev(scores) if len(scores) > 1 else 0.0
            points.append(((up + down) / 1e6, mean(scores), deviation))
            lines.append(
                f"| {travels} | {local} | {seeds[0]['rounds']} | {bytes_in_words(round(up))} | "
                f"{bytes_in_words(round(down))} | {mean_and_spread(scores)} | "
                f"{mean_and_spread([float(one['agreement']) for one in seeds])} |"
            )
        series[travels] = ([x for x, _, _ in points], [y for _, y, _ in points])
        spread[travels] = [each for _, _, each in points]
    line_plot(
        out / "bytes.png",
        series,
        x_label="megabytes in all rounds, both ways, of all clients",
        y_label="Fréchet distance to held-out",
        title="Score against bytes: bits, and local steps a round",
        log_x=True,
        spread=spread,
    )
    text = "\n".join(lines) + "\n"
    write_bytes(out / "table.md", text.encode())
    return text


def _study(options: argparse.Namespace) -> None:
    for name, least in (("steps", 1), ("samples", 20)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name} {value} is impossible; allowed: {least} or more")
    out = options.out or Path("runs") / "bytes-digits"
    outcomes = run_cases(
        cells(options),
        options.pool,
        options.jobs,
        lambda outcome: add_row(out / "cells.csv", row(outcome, options.pool), KEY),
    )
    print(report([row(outcome, options.pool) for outcome in outcomes], out))
    print(f"every number and the picture: {out}")


if __name__ == "__main__":
    raise SystemExit(main())
