"""The options that several sub-commands have, each declared once."""

import argparse
from pathlib import Path
from typing import TypeAlias

from srfed.commands.options import Parser

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a sub-command's parser is added to."""


def add_data(parser: Parser) -> None:
    """``--data``: where a site's images are."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images or an .npz file",
    )


def add_state_dir(parser: Parser) -> None:
    """``--state-dir``: where a site keeps its state."""
    parser.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the site keeps its state",
    )


def add_client_id(parser: Parser, *, required: bool = True) -> None:
    """``--client-id``: the site's name; without ``required`` the name of its data."""
    default = "" if required else "; default: the name of its data"
    parser.add_argument(
        "--client-id",
        required=required,
        metavar="ID",
        help=f"the site's name, the same for ever{default}",
    )
