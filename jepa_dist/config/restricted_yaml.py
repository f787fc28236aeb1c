"""The YAML that configurations are written in: a safe subset of bounded size.

Numbers are decimal, dates are text, a key is given once, and there are no tags besides those of
JSON's types.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from jepa_dist.errors import UserError

# A resolved configuration has 6 KB.
_MOST_BYTES = 2**16
_MOST_NODES = 2**16
_DEEPEST = 32
_MOST_DIGITS = 40

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML in which numbers are decimal (010 is ten, 1e-3 a number) and dates are text.

    Refuses a key given twice and explicit tags besides those of JSON's types.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class declares it
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Decimal; an integer unless there is a point or an exponent."""
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _MOST_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {_MOST_DIGITS} digits", problem_mark=node.start_mark
            )
        if node.tag == f"{_TAG}int":
            return int(text)
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


for _name, _pattern, _first in (
    ("bool", "(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
    ("int", r"[-+]?[0-9](_?[0-9])*", "-+0123456789"),
    ("float", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
for _name in ("null", "bool", "str", "seq", "map"):
    _Loader.add_constructor(f"{_TAG}{_name}", yaml.SafeLoader.yaml_constructors[f"{_TAG}{_name}"])
for _name in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_name}", _Loader.construct_number)
_Loader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined


def parse_yaml(text: str) -> tuple[Any, dict[str, str]]:
    """Return a document's value, and the text of its scalars by dotted key.

    Raises:
        ValueError: not YAML, or beyond a limit of size or depth; one line.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES // 2**10} KiB")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_extent(node, {}, 0)
        return loader.construct_document(node), dict(_scalars(node))
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_extent(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of nodes with all aliases written out.

    Args:
        node: The root of what is counted.
        sizes: Sizes of the nodes counted so far, by id; 0: being counted.
        depth: Depth of ``node``.

    Raises:
        ValueError: too many nodes, too deep, or an alias within its own target.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    known = sizes.get(id(node))
    if known == 0:
        raise ValueError("an alias refers to a value that contains it")
    if known is not None:
        return known
    sizes[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = (part for child in children for part in _as_tuple(child))
    size = 1
    for part in parts:
        size += _check_extent(part, sizes, depth + 1)
        if size > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES} values with all aliases written out")
    sizes[id(node)] = size
    return size


def _as_tuple(child: Any) -> tuple[yaml.Node, ...]:
    return child if isinstance(child, tuple) else (child,)


def _scalars(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if isinstance(value, yaml.ScalarNode):
            yield f"{prefix}{key.value}", value.value
        else:
            yield from _scalars(value, f"{prefix}{key.value}.")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty mapping.

    Raises:
        UserError: unreadable, not YAML, a key given twice, or not a mapping.
    """
    return read_with_texts(path)[0]


def read_with_texts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Like ``read_mapping``, and return the text of its scalars by dotted key."""
    try:
        tree, texts = parse_yaml(_read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return {str(name): value for name, value in tree.items()}, texts


def _read_text(path: Path) -> str:
    """Read a regular file of bounded size: devices and pipes may never end.

    Raises:
        OSError, ValueError: it cannot be read, or is not a regular file of that size.
    """
    if "\0" in str(path):
        raise ValueError("its name holds a NUL character")
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(None, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("expected a regular file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES // 2**10} KiB")
    return data.decode()
