"""Dotted keys of the schema: all of them, those that hold text, and the one most like a typo."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from jepa_dist.config.schema import Config

# Similarity to a longer name takes too long to compute.
_LONGEST_SUGGESTED = 80


def to_dict(config: BaseModel) -> dict[str, Any]:
    """Return the configuration as nested plain data, with the names used in files."""
    return config.model_dump(by_alias=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and leaf values of nested mappings, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@functools.cache
def known_keys() -> dict[str, None]:
    """Return all keys, in the schema's order."""
    return {key: None for key, _ in flatten(to_dict(Config()))}


@functools.cache
def sections() -> frozenset[str]:
    """Return the dotted names of all sections."""
    parts = [key.split(".") for key in known_keys()]
    return frozenset(".".join(path[:n]) for path in parts for n in range(1, len(path)))


@functools.cache
def text_keys() -> dict[str, bool]:
    """Return the keys whose type is text, and whether each may be null.

    Keys that may be a list of sections instead (``list_keys``) are among them.
    """
    return dict(_texts_of(Config))


@functools.cache
def list_keys() -> frozenset[str]:
    """Return the text keys that may be a list of sections instead."""
    return frozenset(
        key
        for key in text_keys()
        if any(item_section(part) for part in get_args(_field(key).annotation))
    )


def _field(key: str) -> Any:
    section: Any = Config
    *parents, leaf = key.split(".")
    for name in parents:
        section = section.model_fields[name].annotation
    return next(f for name, f in section.model_fields.items() if leaf in (name, f.alias))


def item_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that the items of a list type are; None for any other type."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is not list:
        return None
    (item,) = get_args(annotation)
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None


def _texts_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    for name, field in section.model_fields.items():
        key, annotation = f"{prefix}{field.alias or name}", field.annotation
        if is_section(field):
            yield from _texts_of(annotation, f"{key}.")  # type: ignore[arg-type]
        elif _is_text(annotation):
            yield key, type(None) in get_args(annotation)


def _is_text(annotation: Any) -> bool:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(part, str) for part in parts)
    if get_origin(annotation) is Annotated:
        return _is_text(parts[0])
    if get_origin(annotation) in (Union, types.UnionType):
        others = [part for part in parts if part is not type(None) and not item_section(part)]
        return all(map(_is_text, others))
    return annotation is str


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` with the most similar known name, or an empty string."""
    known = list(known)
    if len(name) > _LONGEST_SUGGESTED:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # the section is missing or wrong, e.g. lambda for jepa.lambda
        leaf = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == leaf][:1]
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_section(field: Any) -> bool:
    """Return whether a field of the schema is a section."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
