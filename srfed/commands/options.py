"""The options of every command, and of those that train."""

import argparse
import sys
from pathlib import Path
from typing import Any, Never

from srfed.config import RunConfig, describe
from srfed.config.presets import preset_file, preset_names
from srfed.errors import UserError, did_you_mean
from srfed.interrupts import CLOSED_PIPE, flushed, mend_streams, tell
from srfed.paths import user_path
from srfed.units import escaped

SECTIONS = frozenset(
    name for name, field in RunConfig.model_fields.items() if name not in ("name", "seed")
)


class Parser(argparse.ArgumentParser):
    """The parser of every command and sub-command.

    An option is known by its whole name only (``--data`` is no ``--data-dir``), and ``type=Path``
    knows ``~``.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})
        self.register("type", Path, _path)

    has_settings = False
    """Whether each setting is an option too (:func:`add_configuration`)."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but that nothing may be left over: here, as a sub-command's parser is the
        one that knows what could have been meant.
        """
        given = sys.argv[1:] if args is None else list(args)
        if self.has_settings:
            given = self._with_settings(given)
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            named = (word.partition("=")[0] for word in unknown if word.startswith("--"))
            meant = next((did_you_mean(name, self._option_string_actions) for name in named), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

    def _with_settings(self, given: list[str]) -> list[str]:
        """The words with ``--section.key VALUE`` and ``--section.key=VALUE`` put as ``--set``."""
        words: list[str] = []
        rest = iter(given)
        for word in rest:
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and name.partition(".")[0] in SECTIONS and "." in name:
                if not equals and (value := next(rest, "--")).startswith("--"):
                    self.error(f"--{name}: expected a value")
                words += ["--set", f"{name}={value}"]
            else:
                words.append(word)
        return words

    def print_help(self, file: Any = None) -> None:
        mend_streams()
        try:
            print(self.format_help(), end="", file=file, flush=True)
        except OSError as error:
            flushed()
            raise SystemExit(CLOSED_PIPE if isinstance(error, BrokenPipeError) else 2) from None

    def error(self, message: str) -> Never:
        mend_streams()
        tell(self.format_usage().rstrip("\n"))
        self.exit(2, escaped(f"{self.prog}: error: {message}"))

    def exit(self, status: int = 0, message: str | None = None) -> Never:
        if message:
            tell(message.rstrip("\n"))
        raise SystemExit(status if flushed() else status or CLOSED_PIPE)


def training_parser(program: str, description: str, data: str = "--data-dir") -> Parser:
    """Options of a command that trains; ``data`` is the one that says where the images are. The
    settings are listed in its help.
    """
    parser = Parser(
        prog=program,
        description=description,
        epilog="settings (name = default):\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_configuration(parser)
    parser.add_argument(
        "--clients",
        metavar="N",
        help="the first N tasks (federation.clients); default: all of own data, or 10",
    )
    parser.add_argument(
        data,
        metavar="DIR",
        dest="data_dir",
        help="where the images are (data.dir); what they are is looked up",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the run's folder; default runs/<name>-<time>"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder"
    )
    parser.add_argument(
        "--seeds",
        metavar="0,1,2",
        help="a run for each seed, one after the other, and a table with mean and spread",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="a run for each value of one setting (for each seed too, with --seeds)",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="start_from",
        metavar="RUN",
        help="start from this trained run's φ, with the owners of --data or --data-dir and fresh θ",
    )
    parser.add_argument(
        "--allow-changed-images",
        action="store_true",
        help="with --resume: go on although the images are not those that the run was begun with",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the whole configuration as YAML, for --config, and stop there",
    )
    return parser


def add_configuration(parser: Parser, example: str = "training.batch_size=32") -> None:
    """``--config`` or ``--preset``, and ``--set``, and each setting as an option of its own:
    what is set; a preset is a file like others.
    """
    parser.has_settings = True
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file; default: the embedded digits"
    )
    base.add_argument(
        "--preset",
        type=_preset,
        dest="config",
        metavar="NAME",
        help=f"a configuration that comes with srfed: {', '.join(preset_names())}",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help=f"override settings, e.g. {example}; repeatable; --{example.replace('=', ' ')} is the "
        "same",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """The option for memory that is short; no image depends on it."""
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images sampled at once: fewer take less memory, and the images stay the same; "
        "default: the run's, and half as many where memory is short",
    )


def add_store(source: "argparse._MutuallyExclusiveGroup") -> None:
    """``--store``: a deployed site's, in place of a run's folder."""
    source.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="a deployed site's own store, <state-dir>/<client-id>",
    )


def _preset(name: str) -> Path:
    try:
        return preset_file(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
