"""Several runs that differ in their seed, or in one setting: which they are, and where they lie."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from srfed.config import RunConfig, parse_config, read_settings
from srfed.config.run import sections_of
from srfed.config.yaml import read_value
from srfed.errors import UserError, did_you_mean
from srfed.files import exists, list_folder

MOST_RUNS = 200
"""More are a mistake in what was typed."""


@dataclass(frozen=True)
class Variant:
    """One of the runs.

    Attributes:
        value: of the swept setting, as JSON; empty where none is swept.
        seed: its seed; None where seeds are not asked for.
        settings: what it sets, each "section.key=value".
        folder: its own, within that of all runs.
    """

    value: str
    seed: int | None
    settings: tuple[str, ...]
    folder: str

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with what this run sets; raises UserError where that cannot be."""
        content, said = json.loads(config.to_json()), read_settings(None, self.settings)
        for name, value in said.items():
            content[name] = content[name] | value if isinstance(value, dict) else value
        return parse_config(content, ", ".join(self.settings))


def variants(
    seeds: str | None, sweeps: Sequence[str], overrides: Sequence[str], options: Mapping[str, Any]
) -> list[Variant]:
    """The runs that ``--seeds`` and ``--sweep`` ask for: each value with each seed.

    Args:
        seeds: "0,1,2"; None leaves the run's own seed.
        sweeps: at most one "section.key=a,b,c", the values in YAML.
        overrides: what is set otherwise, each "section.key=value".
        options: settings that the command has options of its own for; None: not given.

    >>> for run in variants("0,1", ["training.batch_size=8,16"], [], {}):
    ...     print(run.folder)
    training.batch_size-8/seed-0
    training.batch_size-8/seed-1
    training.batch_size-16/seed-0
    training.batch_size-16/seed-1

    Raises:
        UserError: they are no such lists, or a setting is said twice.
    """
    if len(sweeps) > 1:
        raise UserError(
            f"--sweep is given {len(sweeps)} times; allowed: once, as one setting is swept"
        )
    numbers = [None] if seeds is None else _seeds(seeds)
    key, values = _swept(sweeps[0]) if sweeps else ("", [""])
    taken = {override.partition("=")[0].strip() for override in overrides}
    taken |= {name for name, value in options.items() if value is not None}
    for name, option in (("seed", seeds), (key, sweeps)):
        if option and name in taken:
            raise UserError(f"{name} is set twice, by an option of its own and by --set or another")
    if len(numbers) * len(values) > MOST_RUNS:
        raise UserError(
            f"--seeds and --sweep ask for {len(numbers) * len(values)} runs; allowed: {MOST_RUNS}"
        )
    if seeds is not None and key == "seed":
        raise UserError("seed is set twice, by --seeds and by --sweep; leave one out")
    found = []
    for value in values:
        for seed in numbers:
            settings = [] if not key else [f"{key}={value}"]
            folders = [] if not key else [f"{key}-{_plain(value)}"]
            if seed is not None:
                settings.append(f"seed={seed}")
                folders.append(f"seed-{seed}")
            found.append(Variant(value, seed, tuple(settings), "/".join(folders)))
    if len({one.folder for one in found}) < len(found):
        raise UserError(f"--sweep {sweeps[0]} has values that would have one folder; leave one out")
    return found


def check_root(root: Path, found: Sequence[Variant]) -> None:
    """Raise UserError unless a folder is new or empty, or has runs of these in it already."""
    if exists(root / "run.json"):
        raise UserError(f"{root} holds a run; name another folder for several with --run-dir")
    if exists(root) and (not root.is_dir() or list_folder(root)):
        parts = {one.folder.split("/")[0] for one in found}
        if not root.is_dir() or not parts & set(list_folder(root)):
            raise UserError(f"{root} is not an empty folder; name another one with --run-dir")


def _seeds(text: str) -> list[int | None]:
    numbers = text.split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", one) for one in numbers):
        raise UserError(f"--seeds {text} is no list of seeds; allowed: such as 0,1,2")
    seeds = [int(one) for one in numbers]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text} has a seed twice; allowed: each once")
    return list(seeds)


def _swept(text: str) -> tuple[str, list[str]]:
    """The setting, and its values as JSON."""
    key, separator, listed = (part.strip() for part in text.partition("="))
    try:
        values = read_value(f"[{listed}]")
    except yaml.YAMLError:
        values = None
    if not separator or not isinstance(values, list) or not values:
        raise UserError(
            f"--sweep {text} is no setting with values; allowed: such as "
            "training.learning_rate=0.001,0.0005"
        )
    section, _, name = key.rpartition(".")
    known = {f"{one}.{each}" for one in RunConfig.model_fields for each in _keys_of(one)} | {"seed"}
    if key not in known or (section == "" and name != "seed"):
        raise UserError(
            f"--sweep {text}: there is no setting {key}{did_you_mean(key, known)}; "
            "python -m srfed.simulate --help lists them"
        )
    return key, [json.dumps(value) for value in values]


def _keys_of(section: str) -> list[str]:
    if section in ("name", "seed"):
        return []
    return [key for each in sections_of(section) for key in each.model_fields]


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", value).strip("-.") or "none"
