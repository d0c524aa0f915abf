"""YAML files and ``--set`` overrides in, a validated configuration out."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from srfed.config.explain import explain
from srfed.config.run import REMOVED, RunConfig
from srfed.config.yaml import read_value, read_yaml_file
from srfed.errors import UserError


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply ``section.key=value`` overrides.

    Args:
        path: a YAML file; None starts from the defaults. What the file leaves out keeps its
            default.
        overrides: each "section.key=value" (or "seed=value"), the value in YAML.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value has the wrong type or is
            impossible.
    """
    file = None if path is None else Path(path)
    return parse_config(read_settings(file, overrides), said_in(file, overrides))


def said_in(path: Path | None, overrides: Sequence[str]) -> str:
    """Where settings were said, for a sentence about one of them."""
    if path is None:
        return "configuration"
    return f"{path} with the command's own settings" if overrides else str(path)


def read_settings(path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a file and overrides name, by section, not yet validated; raises UserError where it
    cannot be read.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = read_yaml_file(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(
                f"{path} must hold sections such as `training:`, not a {type(loaded).__name__}"
            )
        content = loaded or {}
    for override in overrides:
        _apply_override(content, override)
    return content


def parse_config(content: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Validate a nested mapping; raises UserError as :func:`load_config`."""
    try:
        return RunConfig.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(f"{source}: {'; '.join(explain(content, error))}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {_one_line(error)}") from error


@lru_cache(maxsize=8)
def parse_config_json(text: str) -> RunConfig:
    """Validate what :meth:`RunConfig.to_json` wrote, if of an earlier version; raises as
    :func:`load_config`.
    """
    try:
        if any(f'"{name.split(".")[-1]}"' in text for name in REMOVED):
            text = _without_removed(text)
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"configuration: {_one_line(error)}") from error


def _without_removed(text: str) -> str:
    """The text without settings that there are no more; as it is where it is no configuration, as
    whoever reads it says best.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for section, _, key in (name.partition(".") for name in REMOVED):
        if isinstance(content, dict) and isinstance(keys := content.get(section), dict):
            keys.pop(key, None)
    return json.dumps(content)


def _apply_override(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys) or len(keys) > 2:
        raise UserError(
            f"--set {override!r}: write section.key=value, for example training.batch_size=32"
        )
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {override!r}: the value is not valid YAML: {_one_line(error)}"
        ) from error
    target = content
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override!r}: `{key}` is not a section")
    target[keys[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
