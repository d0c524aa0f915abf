"""How YAML is read and written: as people mean it, not as YAML 1.1 has it."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain numbers and truth values, which refuses double keys.

    YAML 1.1 takes 0100 for 64, 1:30 for 90, `no` for false, 5e-4 for a text and 2025-01-31 for a
    date. Here whatever is not a number, true, false or null at first sight is a text, and so is a
    value that is missing, so that it switches nothing off.
    """

    # Of YAML 1.1's own only the merging of mappings.
    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is set twice", problem_mark=node.start_mark
                )
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


def read_value(text: str) -> Any:
    """One value in YAML; where there is none, the empty text, as in a file.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return "" if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
