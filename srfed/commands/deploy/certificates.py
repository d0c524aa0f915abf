"""``certificates``: the SuperLink's certificates and the sites' keys."""

import argparse
from pathlib import Path

from srfed.commands.deploy.options import Commands
from srfed.errors import UserError


def add_certificates(commands: Commands) -> None:
    """Add the parser of ``certificates``."""
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
