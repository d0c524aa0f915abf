"""How YAML is read and written: as people mean it, not as YAML 1.1 has it."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

LONGEST = 2**18
"""Characters of a file; ours have some 5,000."""
DEEPEST = 32
"""Sections in sections, and lists in lists."""
MOST_VALUES = 100_000
"""Values once all that stands for others (aliases, merged mappings) is put in its place: ten short
lines can stand for more than any memory holds."""


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain numbers and truth values, which refuses double keys.

    YAML 1.1 takes 0100 for 64, 1:30 for 90, `no` for false, 5e-4 for a text and 2025-01-31 for a
    date. Here whatever is not a number, true, false or null at first sight is a text, and so is a
    value that is missing, so that it switches nothing off.
    """

    # Of YAML 1.1's own only the merging of mappings.
    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"it is nested more than {DEEPEST} deep",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Hashable] = set()
        for member, _ in node.value:
            key = self.construct_object(member, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(
                    problem="a list or a section is no key", problem_mark=member.start_mark
                )
            if key in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is set twice", problem_mark=node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text such as 1e5, which Loader would read as a number."""


FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _tag, _pattern, _first in (
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"^(?:~|null|Null|NULL)$"), "~nN"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(text: str | bytes, nothing: Any = None) -> Any:
    """What YAML says, the one door for all that is read of it: whoever wrote it, size, depth and
    expansion are bounded before anything is built; ``nothing`` where it says nothing.

    Raises:
        yaml.YAMLError: it is no YAML, or exceeds a bound.
    """
    if len(text) > (LONGEST if isinstance(text, str) else 4 * LONGEST):
        raise yaml.YAMLError(f"it has more than {LONGEST} characters")
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            return nothing if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except ValueError as error:
        # Such as a number of more digits than Python takes.
        raise yaml.YAMLError(str(error)) from error


def read_yaml_file(path: Path) -> Any:
    """:func:`read_yaml` of a file, of which no more is read than there may be.

    Raises:
        OSError: it cannot be read.
        yaml.YAMLError: as :func:`read_yaml`.
    """
    with path.open("rb") as file:
        return read_yaml(file.read(4 * LONGEST + 1))


def read_value(text: str) -> Any:
    """One value in YAML; where there is none, the empty text, as in a file.

    Raises:
        yaml.YAMLError: as :func:`read_yaml`.
    """
    return read_yaml(text, "")


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node stands for, once every alias is replaced; raises YAMLError where they
    are too many.
    """
    if id(node) in counted:
        if not (count := counted[id(node)]):
            raise yaml.MarkedYAMLError(
                problem="it is a part of itself", problem_mark=node.start_mark
            )
        return count
    counted[id(node)], count = 0, 1
    if isinstance(node, yaml.SequenceNode):
        count += sum(_count_values(member, counted) for member in node.value)
    elif isinstance(node, yaml.MappingNode):
        count += sum(_count_values(each, counted) for member in node.value for each in member)
    if count > MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"it stands for more than {MOST_VALUES} values", problem_mark=node.start_mark
        )
    counted[id(node)] = count
    return count
