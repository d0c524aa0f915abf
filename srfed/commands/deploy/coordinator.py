"""What the coordinator types: ``register``, ``sites`` and ``status``."""

import argparse
from pathlib import Path

from srfed.commands.deploy.options import Commands
from srfed.errors import UserError


def add_register(commands: Commands) -> None:
    """Add the parser of ``register``."""
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


def add_sites(commands: Commands) -> None:
    """Add the parser of ``sites``."""
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


def add_status(commands: Commands) -> None:
    """Add the parser of ``status``."""
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


def _status(options: argparse.Namespace) -> None:
    from srfed.deployment.status import status

    print(status(options.run_dir, options.connection))
