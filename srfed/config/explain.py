"""The settings in words: what each is, and what is wrong with a value."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from srfed.config.choices import OWN
from srfed.config.model import SECTIONS, Options
from srfed.config.run import REMOVED, RunConfig, sections_of
from srfed.config.settings import Section
from srfed.errors import did_you_mean

OLD_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FoOxX_:]*")
"""What YAML 1.1 or Python would take for a number: 0100, 0x10, 1_000, 1:30."""


def describe() -> str:
    """One line for each setting: name, type, default, meaning."""
    defaults = default_settings()
    return "\n".join(
        f"  {name} = {json.dumps(defaults[name])}  ({_allowed(field)})\n      {field.description}"
        for name, field in declared_settings()
    )


def default_settings() -> dict[str, Any]:
    """The default of every setting by its name, as JSON has it; of one that the default network has
    not, what its own section has.
    """
    defaults = RunConfig().settings()
    for name, _ in declared_settings():
        if name not in defaults:
            section, key = name.split(".")
            (own,) = [each for each in sections_of(section) if key in each.model_fields][:1]
            defaults[name] = own.model_construct().model_dump(mode="json", include={key})[key]
    return defaults


def declared_settings() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting once, by its name."""
    for name, field in RunConfig.model_fields.items():
        if name in ("name", "seed"):
            yield name, field
            continue
        found: dict[str, FieldInfo] = {}
        for section in sections_of(name):
            found |= {key: v for key, v in section.model_fields.items() if key not in found}
        yield from ((f"{name}.{key}", member) for key, member in found.items())


def _allowed(field: FieldInfo) -> str:
    """The type and range of a field, in words."""
    return _type_words(field.annotation) + _bound_words(field.metadata)


def _bound_words(metadata: Sequence[Any]) -> str:
    symbols = {
        "ge": "≥",
        "gt": ">",
        "le": "≤",
        "lt": "<",
        "min_length": "length ≥",
        "max_length": "length ≤",
        "pattern": "matching",
    }
    words = ""
    for constraint in metadata:
        for attribute, symbol in symbols.items():
            bound = getattr(constraint, attribute, None)
            if bound == OWN:
                words += ', "module:Class" of your own'
            elif bound is not None:
                words += f", {symbol} {bound}"
    return words


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == get_args(Options)[0]:
        return "names with numbers, texts, true | false, or lists of these"
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is Annotated:
        bounds = [constraint for field in arguments[1:] for constraint in field.metadata]
        return f"({_type_words(arguments[0])}{_bound_words(bounds)})"
    if origin is tuple:
        return f"list of {_type_words(arguments[0])}"
    if arguments:
        return " | ".join(_type_words(argument) for argument in arguments)
    words = {
        "NoneType": "null",
        "int": "whole number",
        "float": "number",
        "str": "text",
        "bool": "true | false",
    }
    return words[annotation.__name__]


def _meant(path: Sequence[str], siblings: Iterable[str], known: Iterable[str]) -> str:
    """What an unknown key may have been meant for: one of its name in another section, or one of
    its own section that is spelled alike.
    """
    name = ".".join(path)
    for one in known:
        if one.rpartition(".")[2] == path[-1]:
            # A setting of a network of another kind is meant as it stands.
            return "" if one == name else f", did you mean {one}?"
    within = name[: -len(path[-1])]
    return did_you_mean(name, [within + key for key in siblings])


def explain(content: dict[str, Any], error: ValidationError) -> list[str]:
    """Each thing that is wrong, once: the key, the value, what is allowed."""
    lines: dict[str, None] = {}
    known = dict(declared_settings())
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        siblings: type[Section] = RunConfig
        if path[:1] == ["model"] and len(path) > 1 and path[1] in SECTIONS:
            # A section of several kinds has the kind's name in its path.
            siblings = SECTIONS[path.pop(1)]
        elif len(path) > 1:
            (siblings,) = sections_of(path[0])
        name = ".".join(path[:2]) if ".".join(path[:2]) in known else ".".join(path[:1])
        if problem["type"] == "extra_forbidden" and ".".join(path) in REMOVED:
            lines[
                f"{'.'.join(path)} is no setting any more: {REMOVED['.'.join(path)]}; leave it out"
            ] = None
        elif problem["type"] == "extra_forbidden":
            allowed = ", ".join(siblings.model_fields)
            meant = _meant(path, siblings.model_fields, known)
            lines[f"unknown key `{'.'.join(path)}`{meant}; allowed: {allowed}"] = None
        elif problem["type"] == "value_error":
            where = f"{'.'.join(path)}: " if path else ""
            lines[where + str(problem["ctx"]["error"])] = None
        elif name in known:
            value = content.get(path[0])
            if "." in name and isinstance(value, dict):
                value = value.get(path[1])
            shown = json.dumps(value, ensure_ascii=False)
            hint = (
                ", in decimal digits alone"
                if isinstance(value, str) and OLD_NUMBER.fullmatch(value)
                else ""
            )
            field = siblings.model_fields.get(path[1], known[name]) if "." in name else known[name]
            lines[f"{name} = {shown} is not allowed; allowed: {_allowed(field)}{hint}"] = None
        else:
            lines[
                f"{name} = {json.dumps(problem['input'])} is not allowed; it must be a section of "
                "settings"
            ] = None
    return list(lines)
