"""Run a federation on real machines: ``python -m srfed.deploy certificates | check | rehearse``."""

import argparse
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from srfed.command import Parser, run_command, status_of, tell
from srfed.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m srfed.deploy", description="Prepare, check and rehearse a federation of real machines."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    certificates = commands.add_parser(
        "certificates",
        help="make TLS certificates for the SuperLink, and keys for sites",
        description="With --host: a certificate authority and the SuperLink's certificate. With --site: that site's "
        "key pair; a site can also make its own.",
    )
    certificates.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    certificates.add_argument(
        "--host", action="append", default=[], metavar="HOST", dest="hosts",
        help="DNS name or address under which sites reach the SuperLink; repeatable",
    )  # fmt: skip
    certificates.add_argument(
        "--site", action="append", default=[], metavar="NAME", dest="sites", help="make this site's keys; repeatable"
    )
    certificates.add_argument(
        "--days", type=int, default=365, metavar="N", help="how long the certificates are valid (default 365)"
    )
    certificates.set_defaults(command=_certificates)

    check = commands.add_parser(
        "check",
        help="what a site's owner runs before joining",
        description="Look at a site's images, disk and settings, and say what will travel.",
    )
    check.add_argument("--data", type=Path, required=True, metavar="PATH", help="a folder of images or an .npz file")
    check.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="where the site keeps its state")
    check.add_argument(
        "--client-id", metavar="ID", help="the site's name, the same for ever; default: the name of its data"
    )
    check.add_argument("--out", type=Path, metavar="PNG", help="where the picture goes (default DIR/check.png)")
    _add_configuration(check)
    check.set_defaults(command=_check)

    rehearse = commands.add_parser(
        "rehearse",
        help="run a whole federation on this machine as separate processes",
        description="SuperLink, SuperNodes, TLS and keys as in a real federation, on loopback; given --dir of an "
        "earlier rehearsal it goes on with that.",
    )
    rehearse.add_argument(
        "--clients", metavar="N", help="sites, one for each of the first N tasks (federation.clients)"
    )
    rehearse.add_argument("--dir", type=Path, metavar="DIR", help="where all goes; default runs/rehearsal-<time>")
    _add_configuration(rehearse)
    rehearse.set_defaults(command=_rehearse)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's YAML file; default: the embedded digits")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, e.g. training.batch_size=32; repeatable",
    )  # fmt: skip


def _certificates(options: argparse.Namespace) -> None:
    from srfed.deployment.certificates import describe, make_certificates

    if not options.hosts and not options.sites:
        raise UserError("nothing to make; name --host for the SuperLink's certificate, --site for a site's keys")
    make_certificates(options.out, options.hosts, options.sites, options.days)
    print(describe(options.out, options.hosts, options.sites, options.days))


def _check(options: argparse.Namespace) -> None:
    from srfed.config import load_config

    # A name for a file: "my pictures" becomes "my-pictures".
    client = options.client_id or re.sub(r"[^A-Za-z0-9._-]+", "-", options.data.absolute().stem).strip("._-")
    config = load_config(options.config, options.overrides)
    # After the settings, as it imports torch.
    from srfed.deployment.check import check_site

    print(check_site(config, options.data, options.state_dir, client, options.out))


def _rehearse(options: argparse.Namespace) -> None:
    from srfed.requested_config import requested_config
    from srfed.simulate import check

    folder = (options.dir or Path("runs") / f"rehearsal-{datetime.now().strftime('%Y%m%d-%H%M%S')}").absolute()
    earlier = folder / "config.yaml"
    config = requested_config(
        options.config or (earlier if earlier.is_file() else None),
        options.overrides,
        {"federation.clients": options.clients},
    )
    check(config)
    from srfed.deployment.rehearsal import rehearse

    print(
        f"{config.name}: {config.federation.clients} sites, {config.federation.rounds} rounds\nfolder: {folder}",
        flush=True,
    )
    try:
        rehearse(folder, config)
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        tell(f"stopped; go on with: python -m srfed.deploy rehearse --dir {shlex.quote(str(folder))}")
        raise SystemExit(status_of(stop)) from None
    print(f"\nresults:    {folder / 'run'}")
    print(f"curves:     tensorboard --logdir {folder / 'run' / 'tensorboard'}")
    print(f"site state: {folder / 'sites'}")
    print(f"logs:       {folder / 'logs'}")


if __name__ == "__main__":
    raise SystemExit(main())
