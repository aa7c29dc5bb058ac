"""Documents of YAML, of bounded size; needs no torch."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from worldline.documents import each_once

_MAX_NODES = 1_000_000  # each as often as aliases name it
_MAX_SCALAR = 100  # characters of a number or a date


def parse_yaml(text: str) -> Any:
    """Value of a YAML text in which no mapping has a name twice.

    Raises:
        ValueError, YAMLError, RecursionError: it is no YAML; aliases or nested values are too many.
    """
    loader = _Yaml(text)
    if (node := loader.get_single_node()) is None:
        return None
    level, count = [node], 0
    while level:
        level = [*islice(chain.from_iterable(map(_inner, level)), _MAX_NODES)]
        if (count := count + 1 + len(level)) > _MAX_NODES:  # also where an alias names its own list
            raise ValueError(f"it has more than {_MAX_NODES:,} values; give fewer aliases")
    return loader.construct_document(node)


def _inner(node: Any) -> Iterable[Any]:
    if isinstance(node, yaml.MappingNode):
        return chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """Safe loader that refuses names which stand in a mapping twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            try:
                each_once([(key.value, 0) for key, _ in node.value if isinstance(key.value, str)])
            except ValueError as error:
                raise ConstructorError(None, None, str(error), node.start_mark) from error
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            if len(node.value) > _MAX_SCALAR and not node.tag.endswith(":str"):
                raise ValueError
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # the loader's, of a bad value
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value!r:.80} is no {kind}"
            raise ConstructorError(None, None, problem, node.start_mark) from error
