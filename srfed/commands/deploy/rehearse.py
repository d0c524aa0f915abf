"""``rehearse``: a whole federation on one machine."""

import argparse
import shlex
from datetime import datetime
from pathlib import Path

from srfed.commands.deploy.options import Commands
from srfed.commands.options import add_configuration
from srfed.interrupts import status_of, tell


def add_rehearse(commands: Commands) -> None:
    """Add the parser of ``rehearse``."""
    rehearse = commands.add_parser(
        "rehearse",
        help="run a whole federation on this machine as separate processes",
        description="SuperLink, SuperNodes, TLS and keys as in a real federation, on loopback; "
        "given --dir of an earlier rehearsal it goes on with that.",
    )
    rehearse.add_argument(
        "--clients",
        metavar="N",
        help="sites, one for each of the first N tasks (federation.clients)",
    )
    rehearse.add_argument(
        "--dir", type=Path, metavar="DIR", help="where all goes; default runs/rehearsal-<time>"
    )
    add_configuration(rehearse)
    rehearse.set_defaults(command=_rehearse)


def _rehearse(options: argparse.Namespace) -> None:
    from srfed.files import new_folder
    from srfed.runs.requested import requested_config

    earlier = None if options.dir is None else options.dir / "config.yaml"
    config = requested_config(
        options.config or (earlier if earlier and earlier.is_file() else None),
        options.overrides,
        {"federation.clients": options.clients},
    )
    from srfed.runs.checks import check_simulation

    check_simulation(config)
    from srfed.deployment.rehearsal import rehearse

    own = Path("runs") / f"rehearsal-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    folder = (options.dir or new_folder(own)).absolute()
    print(
        f"{config.name}: {config.federation.clients} sites, {config.federation.rounds} "
        f"rounds\nfolder: {folder}",
        flush=True,
    )
    try:
        rehearse(folder, config)
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        tell(
            f"stopped; go on with: python -m srfed.deploy rehearse --dir {shlex.quote(str(folder))}"
        )
        raise SystemExit(status_of(stop)) from None
    print(f"\nresults:    {folder / 'run'}")
    print(f"curves:     tensorboard --logdir {folder / 'run' / 'tensorboard'}")
    print(f"site state: {folder / 'sites'}")
    print(f"logs:       {folder / 'logs'}")
