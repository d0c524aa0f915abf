"""Run a federation on real machines: ``python -m srfed.deploy COMMAND``."""

from collections.abc import Sequence

from srfed.commands.deploy import certificates, coordinator, rehearse, site
from srfed.commands.options import Parser
from srfed.interrupts import run_command

COMMANDS = (
    certificates.add_certificates,
    site.add_check,
    site.add_agree,
    coordinator.add_register,
    coordinator.add_sites,
    site.add_site,
    coordinator.add_status,
    rehearse.add_rehearse,
)
"""What adds each sub-command's parser, in the order of the help: that in which they are needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.command(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m srfed.deploy",
        description="Prepare, check and rehearse a federation of real machines.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
