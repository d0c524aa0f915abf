"""Every command: ``srfed COMMAND``, or ``python -m srfed COMMAND``."""

import sys
from collections.abc import Sequence

from srfed.commands.table import COMMANDS, run
from srfed.systems import told_of_system


def main(arguments: Sequence[str] | None = None) -> int:
    """The command that the first argument names; returns its exit code."""
    if status := told_of_system():
        return status
    from srfed.commands.options import Parser
    from srfed.errors import did_you_mean

    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        prog="srfed", description="Train diffusion models together without pooling images."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        meant = did_you_mean(given[0], COMMANDS)
        parser.error(f"there is no command {given[0]!r}{meant}; allowed: {', '.join(COMMANDS)}")
    # The command's own parser reads the rest, its --help too.
    name = parser.parse_args(given[:1]).command
    return run(name, given[1:])


if __name__ == "__main__":
    raise SystemExit(main())
