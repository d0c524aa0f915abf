"""A run's settings as Flower's run configuration: the table ``[tool.flwr.app.config]`` of an app,
and what ``flwr run --run-config`` says of it.

Flower's values are truth values, numbers and texts, so a list or null is the text of its YAML.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from srfed.config import default_settings, read_settings
from srfed.config.explain import declared_settings
from srfed.config.yaml import read_value
from srfed.errors import UserError
from srfed.units import printable

Value = bool | int | float | str
OF_THE_RUN: Mapping[str, str] = {"run-dir": "", "config": "", "set": "", "roster": ""}
"""The keys that are no settings, all of them texts; empty is not given."""
TABLE = "tool.flwr.app.config"
_TABLE = re.compile(
    rf"^\[{re.escape(TABLE)}\]\n.*?(?=^\[(?!{re.escape(TABLE)}\.)|\Z)", re.MULTILINE | re.DOTALL
)


def app_config() -> dict[str, Value]:
    """Every key of the app's run configuration with its default, those of settings by their
    names.
    """
    settings = {
        name: value if isinstance(value, Value) else json.dumps(value)
        for name, value in default_settings().items()
    }
    return {**OF_THE_RUN, **settings}


def app_config_toml() -> str:
    """:func:`app_config` as TOML, a table for each section of settings."""
    sections: dict[str, list[str]] = {}
    for name, value in app_config().items():
        section, _, key = name.rpartition(".")
        # JSON's truth values, numbers and texts are TOML's too.
        sections.setdefault(section, []).append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(
        "\n".join([f"[{'.'.join(filter(None, (TABLE, section)))}]", *lines, ""])
        for section, lines in sections.items()
    )


def with_app_config(pyproject: str) -> str:
    """The text of a ``pyproject.toml`` whose run configuration is :func:`app_config`; raises
    UserError where it has none.
    """
    if not _TABLE.search(pyproject):
        raise UserError(f"there is no table [{TABLE}], so it is no Flower app of srfed")
    return _TABLE.sub(lambda _: f"{app_config_toml()}\n", pyproject, count=1)


def said_overrides(
    run_config: Mapping[str, Value], typed: Mapping[str, Value], *, table_counts: bool
) -> list[str]:
    """What was said of the settings, as :func:`~srfed.config.load_config` takes it: each once.

    Args:
        run_config: the app's table with what was typed, as Flower hands it out.
        typed: what was typed alone.
        table_counts: whether a value that somebody has written into the table counts; it does where
            there is neither a configuration file nor a run to go on with.

    Raises:
        UserError: a setting is given twice, and not alike; ``set`` cannot be read.
    """
    defaults = app_config()
    texts = {name for name, field in declared_settings() if field.annotation is str}
    in_table = {
        name: value
        for name, value in run_config.items()
        if table_counts and defaults.get(name, value) != value
    }
    in_set = _overrides(str(run_config.get("set") or ""))
    own = {
        name: value if name in texts else _of_flower(name, value)
        for name, value in {**in_table, **typed}.items()
        if name not in OF_THE_RUN
    }
    for name, value in in_set.items():
        if name in typed and own[name] != value:
            raise UserError(
                f"run-config: {name} is {_shown(own[name])} by its own key and {_shown(value)} by "
                "set; say it once"
            )
    return [f"{name}={_shown(value)}" for name, value in {**own, **in_set}.items()]


def says(overrides: Sequence[str], section: str, key: str) -> bool:
    """Whether one of these overrides is of this setting."""
    keys = read_settings(None, overrides).get(section, {})
    return isinstance(keys, dict) and key in keys


def _overrides(text: str) -> dict[str, Any]:
    """The settings that ``set`` names, by name, each once."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"run-config: set = {printable(text)!r} cannot be read ({error}); allowed: "
            "section.key=value, separated by spaces"
        ) from error
    found: dict[str, Any] = {}
    for word in words:
        for section, keys in read_settings(None, [word]).items():
            named = (
                {f"{section}.{key}": value for key, value in keys.items()}
                if isinstance(keys, dict) and "." in word.partition("=")[0]
                else {section: keys}
            )
            for name, value in named.items():
                if found.get(name, value) != value:
                    raise UserError(
                        f"run-config: {name} is {_shown(found[name])} and {_shown(value)} by set; "
                        "say it once"
                    )
                found[name] = value
    return found


def _of_flower(name: str, value: Value) -> Any:
    """The value of a setting that is not any text: a text is YAML."""
    if not isinstance(value, str):
        return value
    try:
        return read_value(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"run-config: {name} = {printable(value)!r} is not valid YAML: "
            f"{' '.join(str(error).split())}"
        ) from error


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
