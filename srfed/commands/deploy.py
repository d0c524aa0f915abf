"""Run a federation on real machines: ``python -m srfed.deploy COMMAND``."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from srfed.commands.options import Parser
from srfed.errors import UserError
from srfed.interrupts import run_command, status_of, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.command(options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m srfed.deploy",
        description="Prepare, check and rehearse a federation of real machines.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    certificates = commands.add_parser(
        "certificates",
        help="make or renew TLS certificates for the SuperLink, and keys for sites",
        description="With --host: a certificate authority and the SuperLink's certificate. With "
        "--site: that site's key pair; a site can also make its own. With --renew: a new "
        "certificate of the SuperLink from the authority that the sites know, for the names of the "
        "old one or those of --host.",
    )
    certificates.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the files go"
    )
    certificates.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        dest="hosts",
        help="DNS name or address under which sites reach the SuperLink; repeatable",
    )
    certificates.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="NAME",
        dest="sites",
        help="make this site's keys; repeatable",
    )
    certificates.add_argument(
        "--days",
        type=int,
        metavar="N",
        help="how long the SuperLink's certificate is valid (default 365); the authority's is for "
        "ten years",
    )
    certificates.add_argument(
        "--renew",
        action="store_true",
        help="renew the SuperLink's certificate in DIR; its private key stays",
    )
    certificates.set_defaults(command=_certificates)

    check = commands.add_parser(
        "check",
        help="what a site's owner runs before joining",
        description="Look at a site's images, disk and settings, and say what will travel.",
    )
    check.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images or an .npz file",
    )
    check.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the site keeps its state",
    )
    check.add_argument(
        "--client-id",
        metavar="ID",
        help="the site's name, the same for ever; default: the name of its data",
    )
    check.add_argument(
        "--out", type=Path, metavar="PNG", help="where the picture goes (default DIR/check.png)"
    )
    _add_configuration(check)
    check.set_defaults(command=_check)

    agree = commands.add_parser(
        "agree",
        help="what a site's owner allows, written down; without it a site answers nothing",
        description="Show in words what would leave this site and what may be asked of it, ask, "
        "and write it into the state folder. Called again it shows what would change.",
    )
    agree.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images or an .npz file",
    )
    agree.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the site keeps its state",
    )
    agree.add_argument(
        "--client-id", required=True, metavar="ID", help="the site's name, the same for ever"
    )
    agree.add_argument(
        "--root-certificates",
        type=Path,
        metavar="FILE",
        dest="certificate",
        help="ca.crt: the only coordinator that the site is to speak to",
    )
    agree.add_argument(
        "--least-statistics",
        type=int,
        default=20,
        metavar="N",
        help="fewest images behind feature statistics (default 20)",
    )
    agree.add_argument(
        "--least-mean",
        type=int,
        default=8,
        metavar="N",
        help="fewest images behind a mean: a loss, SSIM (default 8)",
    )
    agree.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it computes"
    )
    agree.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of the processor (default 1)"
    )
    agree.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="this site's own copy of the Inception weights; default: downloaded once and verified",
    )
    agree.add_argument("--yes", action="store_true", help="agree without being asked")
    _add_configuration(agree)
    agree.set_defaults(command=_agree)

    _add_sites(commands)
    site = commands.add_parser(
        "site",
        help="what a site runs to take part",
        description="Start this site's SuperNode, keep it running, and say in words what is wrong. "
        "SIGTERM ends it.",
    )
    site.add_argument(
        "--superlink",
        required=True,
        metavar="HOST:PORT",
        help="where the coordinator's SuperLink is",
    )
    site.add_argument(
        "--root-certificates",
        type=Path,
        required=True,
        metavar="FILE",
        help="the coordinator's ca.crt",
    )
    site.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="this site's private key"
    )
    site.add_argument(
        "--client-id", required=True, metavar="ID", help="the site's name, the same for ever"
    )
    site.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images or an .npz file",
    )
    site.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the site keeps its state",
    )
    site.add_argument(
        "--port",
        type=int,
        default=9094,
        metavar="N",
        help="port of this machine's loopback that the SuperNode takes (default 9094); each site "
        "of a machine its own",
    )
    site.set_defaults(command=_site)

    status = commands.add_parser(
        "status",
        help="how a run stands, at the coordinator",
        description="Rounds, sites and their last answers, Flower's runs, and what to do.",
    )
    status.add_argument(
        "--run-dir", type=Path, required=True, metavar="DIR", help="the run's folder"
    )
    status.add_argument(
        "--connection", metavar="NAME", help="the SuperLink's name in Flower's config.toml"
    )
    status.set_defaults(command=_status)

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
    _add_configuration(rehearse)
    rehearse.set_defaults(command=_rehearse)
    return parser


def _add_sites(commands: "argparse._SubParsersAction[Parser]") -> None:
    register = commands.add_parser(
        "register",
        help="let a site's key in, and note whose it is",
        description="As `flwr supernode register`, under the site's name, and notes which node it "
        "is.",
    )
    register.add_argument("--site", required=True, metavar="NAME", help="the site's name")
    register.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="its public key, site-<name>.pub"
    )
    register.add_argument(
        "--connection",
        default="",
        metavar="NAME",
        help="the SuperLink in Flower's config.toml; default: the default one",
    )
    register.add_argument(
        "--notes", type=Path, metavar="FILE", help="default: registered.json beside the key"
    )
    register.set_defaults(command=_register)

    sites = commands.add_parser(
        "sites",
        help="which site is which",
        description="Client id, site, node, key, images and last answer of each site.",
    )
    sites.add_argument("--run", type=Path, metavar="DIR", help="the run's folder")
    sites.add_argument(
        "--notes", type=Path, metavar="FILE", help="the registered.json that `register` has written"
    )
    sites.add_argument(
        "--rebind",
        metavar="ID",
        help="forget to which key this client id belongs, and how many images it had; not while "
        "the server runs",
    )
    sites.set_defaults(command=_sites)


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the run's YAML file; default: the embedded digits",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting, e.g. training.batch_size=32; repeatable",
    )


def _certificates(options: argparse.Namespace) -> None:
    from srfed.deployment.certificates import (
        DAYS,
        SERVER_CERTIFICATE,
        describe,
        make_certificates,
        renew_certificate,
    )

    if options.renew:
        if options.sites:
            raise UserError(
                "--renew is for the SuperLink's certificate; a site's keys do not expire"
            )
        end = renew_certificate(
            options.out, options.hosts, DAYS if options.days is None else options.days
        )
        print(
            f"{options.out / SERVER_CERTIFICATE} is valid until {end:%Y-%m-%d %H:%M} UTC; restart "
            "the SuperLink"
        )
        return
    if not options.hosts and not options.sites:
        raise UserError(
            "nothing to make; name --host for the SuperLink's certificate, --site for a site's keys"
        )
    if options.days is not None and not options.hosts:
        raise UserError(
            f"--days {options.days} would be ignored: a site's keys do not expire; leave it out"
        )
    make_certificates(
        options.out, options.hosts, options.sites, DAYS if options.days is None else options.days
    )
    print(describe(options.out, options.hosts, options.sites))


def _check(options: argparse.Namespace) -> None:
    from srfed.config import load_config

    # A name for a file: "my pictures" becomes "my-pictures".
    client = options.client_id or re.sub(
        r"[^A-Za-z0-9._-]+", "-", options.data.absolute().stem
    ).strip("._-")
    config = load_config(options.config, options.overrides)
    # After the settings, as it imports torch.
    from srfed.deployment.check import check_site

    print(check_site(config, options.data, options.state_dir, client, options.out))


def _agree(options: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from srfed.config import load_config
    from srfed.federation.agreement import AGREEMENT_FILE, LeastImages, SiteResources

    state_dir = options.state_dir.absolute()
    weights = "" if options.inception_weights is None else str(options.inception_weights.absolute())
    try:
        least = LeastImages(statistics=options.least_statistics, mean=options.least_mean)
        resources = SiteResources(
            device=options.device, threads=options.threads, inception_weights=weights
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(
            f"{problem['loc'][0]} = {problem['input']} is impossible: {problem['msg']}"
        ) from error
    config = load_config(options.config, options.overrides)
    # After the settings, as it imports torch.
    from srfed.data import current_images, describe_own_images
    from srfed.deployment.agree import agree, in_words, propose, standing

    data, folder = options.data, state_dir / options.client_id
    proposed = propose(
        config,
        data,
        state_dir,
        options.client_id,
        certificate=options.certificate,
        least=least,
        resources=resources,
    )
    print(in_words(proposed, config))
    print("\n".join(["", f"images:     {data}", *describe_own_images(config.data, data)]))
    if changed := current_images(config.data, data, options.client_id, folder)[1]:
        print(f"\nyour images are others than those on record: {changed}")
    if (agreement := standing(state_dir, options.client_id)) is not None:
        changes = agreement.differences(proposed)
        if not changes:
            print(f"\n{folder / AGREEMENT_FILE} says so already, since {agreement.agreed}")
            return
        print(f"\nwhat stands since {agreement.agreed} would change:")
        print("\n".join(f"  {line}" for line in changes))
    if not options.yes and not _confirmed(
        f"\nagree, as the owner of {options.client_id}'s images? [y/N] "
    ):
        raise UserError("not agreed; nothing was written")
    agree(proposed, config, data, state_dir)
    print(f"agreed: {folder / AGREEMENT_FILE}")


def _confirmed(question: str) -> bool:
    """What a person answers; raises UserError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; agree with --yes")
    return input(question).strip().lower() in ("y", "yes")


def _register(options: argparse.Namespace) -> None:
    from srfed.deployment.sites import register_site

    print(register_site(options.site, options.key, options.connection, options.notes))


def _sites(options: argparse.Namespace) -> None:
    from srfed.deployment.sites import rebind, sites_in_words

    if options.rebind is not None and options.run is None:
        raise UserError(
            f"--rebind {options.rebind} needs --run, the folder of the run that has this client"
        )
    if options.run is None and options.notes is None:
        raise UserError(
            "nothing to show; name --run, the folder of a run, or --notes, the file that register "
            "wrote"
        )
    if options.rebind is not None:
        print(rebind(options.run, options.rebind))
    else:
        print(sites_in_words(options.run, options.notes))


def _site(options: argparse.Namespace) -> None:
    from srfed.deployment.site_command import SiteSettings, run_site

    certificates, key, data, state_dir = (
        path.absolute()
        for path in (options.root_certificates, options.key, options.data, options.state_dir)
    )
    run_site(
        SiteSettings(
            options.superlink, certificates, key, options.client_id, data, state_dir, options.port
        )
    )


def _status(options: argparse.Namespace) -> None:
    from srfed.deployment.status import status

    print(status(options.run_dir, options.connection))


def _rehearse(options: argparse.Namespace) -> None:
    from srfed.config.requested import requested_config
    from srfed.files import new_folder

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
