"""Run a federation on real machines: ``python -m srfed.deploy certificates | check | site | status | rehearse``."""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from srfed.command import INTERRUPTED, run_command
from srfed.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srfed.deploy", description="Prepare, check and rehearse a federation of real machines."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    certificates = commands.add_parser(
        "certificates",
        help="make or renew TLS certificates for the SuperLink, and keys for sites",
        description="With --host: a certificate authority and the SuperLink's certificate. With --site: that site's "
        "key pair; a site can also make its own. With --renew: a new certificate of the SuperLink from the authority "
        "that the sites know, for the names of the old one or those of --host.",
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
        "--days", type=int, default=365, metavar="N",
        help="how long the SuperLink's certificate is valid (default 365); the authority's is for ten years",
    )  # fmt: skip
    certificates.add_argument(
        "--renew", action="store_true", help="renew the SuperLink's certificate in DIR; its private key stays"
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

    site = commands.add_parser(
        "site",
        help="what a site runs to take part",
        description="Start this site's SuperNode, keep it running, and say in words what is wrong. SIGTERM ends it.",
    )
    site.add_argument("--superlink", required=True, metavar="HOST:PORT", help="where the coordinator's SuperLink is")
    site.add_argument("--root-certificates", type=Path, required=True, metavar="FILE", help="the coordinator's ca.crt")
    site.add_argument("--key", type=Path, required=True, metavar="FILE", help="this site's private key")
    site.add_argument("--client-id", required=True, metavar="ID", help="the site's name, the same for ever")
    site.add_argument("--data", type=Path, required=True, metavar="PATH", help="a folder of images or an .npz file")
    site.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="where the site keeps its state")
    site.add_argument(
        "--port", type=int, default=9094, metavar="N",
        help="port of this machine's loopback that the SuperNode takes (default 9094); each site of a machine its own",
    )  # fmt: skip
    site.set_defaults(command=_site)

    status = commands.add_parser(
        "status",
        help="how a run stands, at the coordinator",
        description="Rounds, sites and their last answers, Flower's runs, and what to do.",
    )
    status.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="the run's folder")
    status.add_argument("--connection", metavar="NAME", help="the SuperLink's name in Flower's config.toml")
    status.set_defaults(command=_status)

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
    from srfed.deployment.certificates import SERVER_CERTIFICATE, describe, make_certificates, renew_certificate

    if options.renew:
        if options.sites:
            raise UserError("--renew is for the SuperLink's certificate; a site's keys do not expire")
        end = renew_certificate(options.out, options.hosts, options.days)
        print(f"{options.out / SERVER_CERTIFICATE} is valid until {end:%Y-%m-%d %H:%M} UTC; restart the SuperLink")
        return
    if not options.hosts and not options.sites:
        raise UserError("nothing to make; name --host for the SuperLink's certificate, --site for a site's keys")
    make_certificates(options.out, options.hosts, options.sites, options.days)
    print(describe(options.out, options.hosts, options.sites))


def _check(options: argparse.Namespace) -> None:
    from srfed.config import load_config
    from srfed.deployment.check import check_site

    # A name for a file: "my pictures" becomes "my-pictures".
    client = options.client_id or re.sub(r"[^A-Za-z0-9._-]+", "-", options.data.absolute().stem).strip("._-")
    config = load_config(options.config, options.overrides)
    print(check_site(config, options.data, options.state_dir, client, options.out))


def _site(options: argparse.Namespace) -> None:
    from srfed.deployment.site_command import SiteSettings, run_site

    certificates, key, data, state_dir = (
        path.expanduser().absolute()
        for path in (options.root_certificates, options.key, options.data, options.state_dir)
    )
    run_site(SiteSettings(options.superlink, certificates, key, options.client_id, data, state_dir, options.port))


def _status(options: argparse.Namespace) -> None:
    from srfed.deployment.status import status

    print(status(options.run_dir, options.connection))


def _rehearse(options: argparse.Namespace) -> None:
    from srfed.config import load_config
    from srfed.deployment.rehearsal import rehearse
    from srfed.simulate import check

    folder = (options.dir or Path("runs") / f"rehearsal-{datetime.now().strftime('%Y%m%d-%H%M%S')}").absolute()
    overrides = list(options.overrides)
    if options.clients is not None:
        overrides.append(f"federation.clients={options.clients}")
    earlier = folder / "config.yaml"
    config = load_config(options.config or (earlier if earlier.is_file() else None), overrides)
    if config.data.dir:
        # Flower's processes, and later rehearsals, may stand in other folders.
        data = config.data.model_copy(update={"dir": str(Path(config.data.dir).absolute())})
        config = config.model_copy(update={"data": data})
    check(config)
    print(
        f"{config.name}: {config.federation.clients} sites, {config.federation.rounds} rounds\nfolder: {folder}",
        flush=True,
    )
    try:
        rehearse(folder, config)
    except KeyboardInterrupt:
        print(f"stopped; go on with: python -m srfed.deploy rehearse --dir {folder}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    print(f"\nresults:    {folder / 'run'}")
    print(f"curves:     tensorboard --logdir {folder / 'run' / 'tensorboard'}")
    print(f"site state: {folder / 'sites'}")
    print(f"logs:       {folder / 'logs'}")


if __name__ == "__main__":
    raise SystemExit(main())
