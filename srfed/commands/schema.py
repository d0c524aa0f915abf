"""The settings as a JSON schema, for editors: ``srfed schema > srfed.schema.json``."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed schema",
        description="Print the JSON schema of a configuration file. An editor that knows YAML then "
        "completes and checks a file that begins with the line "
        "'# yaml-language-server: $schema=srfed.schema.json'.",
    )
    parser.add_argument(
        "--flower",
        type=Path,
        metavar="FILE",
        help="instead write every setting with its default into this pyproject.toml of a Flower "
        "app, as its [tool.flwr.app.config]",
    )
    options = parser.parse_args(arguments)
    if options.flower is not None:
        return run_command(partial(_write_app_config, options.flower))
    return run_command(_show)


def _write_app_config(file: Path) -> None:
    from srfed.errors import UserError
    from srfed.federation.run_config import with_app_config
    from srfed.files import read_bytes, write_bytes

    try:
        written = with_app_config(read_bytes(file).decode())
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--flower {file}: {error}") from error
    write_bytes(file, written.encode(), private=False)


def _show() -> None:
    from srfed.config import RunConfig

    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "Configuration of a run of srfed",
    }
    print(json.dumps(schema, indent=2, ensure_ascii=False))
