"""What is joining worth? ``python -m simulations.joining --set characters --data-dir DIR``.

Owners train alone, with the paper's k = 1, with everything shared but small parts of their own, and
as one party that has all images: on the same images, with the same number of steps. Every network
is judged at its own best round by validation images; the test images are looked at once, at the
end. Stopped, it goes on where it was.

    cells.csv     a line for each run, as soon as it has ended
    sides.csv, sides.md, owners.csv, loss.png     at the end
    images.csv, images.md, images.png             and with --alone-images
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.errors import UserError
from srfed.interrupts import run_command
from srfed.paths import absolute_path
from srfed.studies.cases import add_options, asked_seeds, change
from srfed.studies.gains import describe_worth, report, run_cells
from srfed.studies.joining import ALONE, COMMON, OWN_RATES, SIDES, alone_with, cells
from srfed.studies.owners import SETS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m simulations.joining",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", dest="owner_set", choices=sorted(SETS), default="characters")
    parser.add_argument("--owners", type=int, metavar="N", help="the first N; default: the set's")
    parser.add_argument(
        "--images", type=int, metavar="N", help="training images an owner; default: the set's"
    )
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="images an owner to choose a round by, besides; default: the set's",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (14)")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="1: grey, 3: colour; default: the set's"
    )
    parser.add_argument("--rounds", type=int, default=80, help="rounds of 16 steps (80)")
    parser.add_argument(
        "--every", type=int, default=4, metavar="N", help="rounds between validations (4)"
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="samples an owner to score (64)"
    )
    parser.add_argument(
        "--test-images", type=int, default=96, metavar="N", help="test images an owner (96)"
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=20,
        metavar="N",
        help="end where no network has been better for N rounds; 0: never (20)",
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=list(SIDES),
        metavar="SIDE",
        help="which; alone, that all are compared with, among them (" + " ".join(SIDES) + ")",
    )
    parser.add_argument(
        "--alone-images",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="besides, owners alone with N training images: with how many is one as good alone?",
    )
    parser.add_argument(
        "--stack",
        type=int,
        metavar="N",
        help="so many owners train as one program, which is faster for small images",
    )
    parser.add_argument(
        "--own-rate",
        action="append",
        default=[],
        metavar="SIDE=FACTOR",
        help="learning rate of θ_i over that of φ; default: "
        + ", ".join(f"{side}={factor:g}" for side, factor in OWN_RATES.items()),
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options), options.minutes)


def _study(options: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("every", 1), ("samples", 2)):
        _at_least(name, getattr(options, name), least)
    _at_least("test-images", options.test_images, 2)
    _at_least("patience", options.patience, 0)
    for count in options.alone_images:
        _at_least("alone-images", count, 1)
    if ALONE not in options.sides:
        raise UserError(f"--sides {' '.join(options.sides)} is impossible; {ALONE} is missing")
    base, pool = configuration(options), options.pool
    asked = cells(
        options.owner_set,
        base,
        {name: getattr(options, name) for name in ("every", "samples", "test_images", "patience")},
        asked_seeds(options),
        _own_rates(options.own_rate),
        [side for side in SIDES if side in options.sides],
    )
    others = alone_with(options.alone_images, base, asked)
    # What is wrong with the images is said before anything is trained.
    for config in (base, *(cell.config for cell in others)):
        load_tasks(config.data, config.federation.clients)
    out = options.out or Path("runs") / f"joining-{options.owner_set}-{base.federation.clients}"
    outcomes = run_cells([*asked, *others], pool, options.jobs, out)
    mine, of_others = outcomes[: len(asked)], outcomes[len(asked) :]
    print(report(asked, mine, out))
    if others:
        print(describe_worth(asked, mine, others, of_others, out))
    print(f"every number and the picture: {out}")


def configuration(options: argparse.Namespace) -> RunConfig:
    """What all sides have in common; raises UserError where it is impossible."""
    chosen = SETS[options.owner_set]
    owners = chosen.usual if options.owners is None else options.owners
    images = chosen.images if options.images is None else options.images
    validation = chosen.validation if options.validation is None else options.validation
    if not 2 <= owners <= chosen.owners:
        raise UserError(f"--owners {owners} is impossible; allowed: 2 to {chosen.owners}")
    _at_least("images", images, 1)
    _at_least("validation", validation, 2)
    data = None if options.data_dir is None else absolute_path(options.data_dir)
    asked = {"data__image_size": options.size, "data__channels": options.channels}
    settings = {
        **chosen.settings(data, options.pool, owners),
        **{name: value for name, value in asked.items() if value is not None},
    }
    return change(
        change(RunConfig(), **COMMON),
        name="joining",
        **settings,
        data__images_per_task=images + validation,
        data__validation_images=validation,
        federation__clients=owners,
        federation__rounds=options.rounds,
        resources__stack="auto" if options.stack is None else options.stack,
        evaluation__samples=2 * owners,
        evaluation__samples_between=2 * owners,
        resources__device=options.device,
    )


def _own_rates(given: Sequence[str]) -> dict[str, float]:
    rates = dict(OWN_RATES)
    for text in given:
        side, _, factor = text.partition("=")
        try:
            rates[side] = float(factor)
        except ValueError:
            rates[side] = 0.0
        if side not in SIDES or not 0 < rates[side] < float("inf"):
            raise UserError(
                f"--own-rate {text} is impossible; allowed: SIDE=FACTOR with a SIDE of "
                f"{', '.join(SIDES)} and a FACTOR above 0"
            )
    return rates


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name} {value} is impossible; allowed: {least} or more")


if __name__ == "__main__":
    raise SystemExit(main())
