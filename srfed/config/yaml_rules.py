"""How YAML is read and written: as people mean it, not as YAML 1.1 has it."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number (YAML 1.1 would make it a string) and refuses double keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text such as 1e5, which Loader would read as a number."""


for _side in (Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$"),
        list("-+0123456789."),
    )
# JSON has no dates, and no setting is one: a folder named 2025-01-31 is meant as text.
Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value))
