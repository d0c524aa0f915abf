"""The settings as a JSON schema, for editors: ``srfed schema > srfed.schema.json``."""

import json
from collections.abc import Sequence

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
    parser.parse_args(arguments)
    return run_command(_show)


def _show() -> None:
    from srfed.config import RunConfig

    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "Configuration of a run of srfed",
    }
    print(json.dumps(schema, indent=2, ensure_ascii=False))
