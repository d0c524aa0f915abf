"""What does a new owner gain? ``python -m simulations.new_owner --set characters --data-dir DIR``.

A federation that shares everything but small parts, one with k = 1, and one party with all images
are trained on the first owners of a set, as ``simulations.joining`` trains them. Then come owners
that nobody has seen, with a few images each: θ_new is fitted to these for each of the three cores,
which stay as they are, and a network is trained from scratch. The core is that of its best round,
the new owner's model that of its best step, by images set aside; the test images are looked at
once, at the end. Stopped, it goes on where it was.

    cells.csv     a line for each new owner, number of images, side and seed, as soon as it is there
    curve.csv, curve.md, owners.csv, curve.png     at the end
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from simulations import joining
from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.errors import UserError
from srfed.interrupts import run_command
from srfed.paths import absolute_path
from srfed.studies.cases import add_options, asked_seeds, change, run_jobs
from srfed.studies.new_owner import PLANS, core_jobs, cores, new_owner_cells
from srfed.studies.new_owner_gains import report, run_new_owners
from srfed.studies.owners import SETS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m simulations.new_owner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", dest="owner_set", choices=sorted(SETS), default="characters")
    parser.add_argument(
        "--owners", type=int, metavar="N", help="how many train, the first; default: the set's"
    )
    parser.add_argument(
        "--new", type=int, metavar="N", help="how many come later, the next; default: the set's"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        metavar="N",
        help="training images of a new owner; default: the set's",
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=3,
        metavar="N",
        help="images of a new owner to choose a step by, besides (3)",
    )
    parser.add_argument("--rounds", type=int, default=80, help="rounds of a core, of 16 steps (80)")
    parser.add_argument(
        "--every", type=int, default=4, metavar="N", help="rounds between a core's validations (4)"
    )
    parser.add_argument(
        "--steps", type=int, default=1280, metavar="N", help="local steps of a new owner (1280)"
    )
    parser.add_argument(
        "--between",
        type=int,
        default=20,
        metavar="N",
        help="steps between a new owner's validations (20)",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=20,
        metavar="N",
        help="end a core where no round has been better for N rounds; 0: never (20)",
    )
    parser.add_argument(
        "--patience-steps",
        type=int,
        default=240,
        metavar="N",
        help="end a new owner where no step has been better for N steps; 0: never (240)",
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="samples an owner to score (64)"
    )
    parser.add_argument(
        "--test-images", type=int, default=96, metavar="N", help="test images an owner (96)"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _study(options), options.minutes)


def _study(options: argparse.Namespace) -> None:
    plan = PLANS[options.owner_set]
    known = plan.known if options.owners is None else options.owners
    new = plan.new if options.new is None else options.new
    counts = sorted({*(plan.images if options.images is None else options.images)})
    for name, least in (
        ("rounds", 1),
        ("every", 1),
        ("samples", 2),
        ("test-images", 2),
        ("validation", 2),
        ("between", 1),
        ("steps", 1),
        ("patience", 0),
        ("patience-steps", 0),
    ):
        _within(name, getattr(options, name.replace("-", "_")), least)
    _within("owners", known, 2, SETS[options.owner_set].owners - 1)
    _within("new", new, 1, SETS[options.owner_set].owners - known)
    _within("images", counts[0], 2)
    _within("between", options.between, 1, options.steps)
    base = joining.configuration(
        argparse.Namespace(
            **{
                **vars(options),
                "owners": known,
                **dict.fromkeys(("images", "validation", "stack", "size", "channels")),
            }
        )
    )
    everybody = _everybody(options, base, known + new, counts[-1] + options.validation)
    # What is wrong with the images is said before anything is trained.
    load_tasks(base.data, known)
    load_tasks(everybody.data, known + new)
    scores = {name: getattr(options, name) for name in ("samples", "test_images")}
    judging = {"every": options.every, "patience": options.patience, **scores}
    trained = cores(options.owner_set, base, judging, asked_seeds(options))
    asked = new_owner_cells(
        trained,
        everybody,
        known,
        counts,
        {
            "steps": options.steps,
            "between": options.between,
            "patience": options.patience_steps,
            **scores,
        },
    )
    out = options.out or Path("runs") / f"new-owner-{options.owner_set}-{known}"
    run_jobs(core_jobs(trained, options.pool), options.pool, options.jobs)
    print(report(asked, run_new_owners(asked, options.pool, options.jobs, out), out))
    print(f"every number and the picture: {out}")


def _everybody(options: argparse.Namespace, base: RunConfig, owners: int, images: int) -> RunConfig:
    """The settings of all owners' images; raises UserError where they are impossible."""
    data = None if options.data_dir is None else absolute_path(options.data_dir)
    return change(
        base,
        **SETS[options.owner_set].settings(data, options.pool, owners),
        data__images_per_task=images,
        data__validation_images=options.validation,
        federation__clients=owners,
        evaluation__samples=2 * owners,
        evaluation__samples_between=2 * owners,
    )


def _within(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"--{name} {value} is impossible; allowed: {allowed}")


if __name__ == "__main__":
    raise SystemExit(main())
