"""What a site's owner types: ``check``, ``agree`` and ``site``."""

import argparse
import re
import sys
from pathlib import Path

from srfed.commands.deploy.options import (
    Commands,
    add_client_id,
    add_data,
    add_state_dir,
)
from srfed.commands.options import add_configuration
from srfed.errors import UserError


def add_check(commands: Commands) -> None:
    """Add the parser of ``check``."""
    check = commands.add_parser(
        "check",
        help="what a site's owner runs before joining",
        description="Look at a site's images, disk and settings, and say what will travel.",
    )
    add_data(check)
    add_state_dir(check)
    add_client_id(check, required=False)
    check.add_argument(
        "--out", type=Path, metavar="PNG", help="where the picture goes (default DIR/check.png)"
    )
    add_configuration(check)
    check.set_defaults(command=_check)


def add_agree(commands: Commands) -> None:
    """Add the parser of ``agree``."""
    agree = commands.add_parser(
        "agree",
        help="what a site's owner allows, written down; without it a site answers nothing",
        description="Show in words what would leave this site and what may be asked of it, ask, "
        "and write it into the state folder. Called again it shows what would change.",
    )
    add_data(agree)
    add_state_dir(agree)
    add_client_id(agree)
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
    agree.add_argument(
        "--mod",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        dest="mods",
        help="a mod of Flower's kind, of a package that is installed here, to stand between the "
        "guard and what answers; repeat it for more, the outermost first",
    )
    agree.add_argument(
        "--runs",
        type=int,
        default=1,
        metavar="N",
        help="how many runs may be begun under this agreement (default 1); agreeing again counts "
        "anew",
    )
    agree.add_argument("--yes", action="store_true", help="agree without being asked")
    add_configuration(agree)
    agree.set_defaults(command=_agree)


def add_site(commands: Commands) -> None:
    """Add the parser of ``site``."""
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
    add_client_id(site)
    add_data(site)
    add_state_dir(site)
    site.add_argument(
        "--port",
        type=int,
        default=9094,
        metavar="N",
        help="port of this machine's loopback that the SuperNode takes (default 9094); each site "
        "of a machine its own",
    )
    site.set_defaults(command=_site)


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
    from srfed.federation.agreement import AGREEMENT_FILE, MOST_RUNS, LeastImages, SiteResources
    from srfed.files import exists

    if not 1 <= options.runs <= MOST_RUNS:
        raise UserError(f"--runs {options.runs} is impossible; allowed: 1 to {MOST_RUNS}")
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
    from srfed.data import current_images, describe_contents, describe_own_images
    from srfed.deployment.agree import agree, in_words, propose, standing
    from srfed.federation.asked import ASKED_FILE

    data, folder = options.data, state_dir / options.client_id
    proposed = propose(
        config,
        data,
        state_dir,
        options.client_id,
        certificate=options.certificate,
        least=least,
        resources=resources,
        mods=options.mods,
        runs=options.runs,
    )
    print(in_words(proposed, config))
    print("\n".join(["", f"images:     {data}", *describe_own_images(config.data, data)]))
    task, changed = current_images(config.data, data, options.client_id, folder)
    for line in describe_contents(config.data, [task]):
        print(f"contents:   {line}")
    if changed:
        print(f"\nyour images are others than those on record: {changed}")
    if (agreement := standing(state_dir, options.client_id)) is not None:
        changes = agreement.differences(proposed)
        if not changes and exists(folder / ASKED_FILE):
            changes = ["what was asked under it counts no more, so another run may begin"]
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
