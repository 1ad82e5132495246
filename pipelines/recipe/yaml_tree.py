"""YAML as recipes use it: plain values, and no mapping that has a key twice, of which any reader would drop one.

In: the text of a file or of a `--set` value. Out: plain Python values.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """Plain values. Raises ValueError in one line on what is not YAML and on a key that occurs twice, by its lines."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or number that there is not
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()  # by id: the nodes live as long as this object's tree

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping before the keys of `<<` are merged into it, and again where it is itself merged."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_doubled_keys(node)
        super().flatten_mapping(node)

    def _refuse_doubled_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a mapping, which the base class refuses
            is_special = key_node.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")  # `<<` and `=`
            key: Hashable = key_node.value if is_special else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                where = f"in lines {lines[key]} and {line}" if lines[key] != line else f"in line {line}"
                raise ValueError(f"the key {key!r} occurs twice, {where}; keep one of the two")
            lines[key] = line
