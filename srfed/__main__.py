"""Every command: ``srfed COMMAND``, or ``python -m srfed COMMAND``."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": ("srfed.commands.train:train", "train on images of your own: proposes the rest"),
    "simulate": ("srfed.commands.train:simulate", "train over n simulated clients"),
    "centralise": ("srfed.commands.train:centralise", "train a baseline with all images"),
    "sample": ("srfed.commands.sample:main", "generate images with a trained run"),
    "evaluate": ("srfed.commands.evaluate:main", "score a trained run in every way there is"),
    "adapt": ("srfed.commands.adapt:main", "fit a new task to a trained run"),
    "partition": ("srfed.commands.partition:main", "show what is shared and what is exclusive"),
    "deploy": ("srfed.commands.deploy:main", "run a federation on real machines"),
    "schema": ("srfed.commands.schema:main", "print the settings as a JSON schema, for editors"),
    "completion": ("srfed.commands.completion:main", "print a script that completes in the shell"),
}
"""What each command is, and where."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command that the first argument names; returns its exit code."""
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
    module, function = COMMANDS[name][0].split(":")
    return int(getattr(import_module(module), function)(given[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
