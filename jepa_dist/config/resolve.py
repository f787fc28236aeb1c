"""Resolution: defaults < YAML file < JEPA_* environment < KEY=VALUE on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jepa_dist.config.keys import (
    flatten,
    known_keys,
    list_keys,
    sections,
    suggest,
    text_keys,
    to_dict,
)
from jepa_dist.config.restricted_yaml import parse_yaml, read_with_texts
from jepa_dist.config.rules import check
from jepa_dist.config.schema import Config
from jepa_dist.errors import UserError
from jepa_dist.shipped import find_config

# The environment switches of parameter-golf issue #1772.
ENVIRONMENT = {
    "JEPA_LAMBDA": "jepa.lambda",
    "JEPA_MAX_SPAN_FRAC": "jepa.max_span_frac",
    "JEPA_START_FRAC": "jepa.start_frac",
    "JEPA_LAYER": "jepa.layer",
}
# JEPA_* variables that are not configuration.
_FOREIGN_ENVIRONMENT = {"JEPA_GOLDEN_DIR"}

_MOST_UNKNOWN = 20
_MOST_SHOWN = 120

_Layer = Iterable[tuple[str, Any, str]]


@dataclass(frozen=True)
class Resolved:
    """A validated configuration and, per dotted key, where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def describe(self) -> str:
        """Return one line per key: value and source (default, file, environment, command line)."""
        lines = []
        for key, value in flatten(to_dict(self.config)):
            shown = f"{key}: {yaml_scalar(value)}"
            lines.append(f"{shown:<50} # {self.sources.get(key, 'default')}")
        return "\n".join(lines)


def load(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve a configuration.

    Args:
        path: YAML file, the name of a shipped one (``debug``), or None for defaults only.
        overrides: ``KEY=VALUE`` strings, e.g. ``jepa.lambda=0.02``.
        environ: Environment to read the ``JEPA_*`` switches from (default: the process's).

    Raises:
        UserError: unknown keys, wrong types, impossible combinations; all of them at once.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    unknown = 0
    layers = [
        *([_from_file(find_config(path))] if path is not None else []),
        _from_environment(os.environ if environ is None else environ),
        _from_command_line(overrides),
    ]
    for layer in layers:
        for key, value, source in layer:
            if key in known_keys():
                values[key] = value
                sources[key] = source
                continue
            unknown += 1
            if unknown <= _MOST_UNKNOWN:
                problems.append(_unknown_key(key, source))
    if unknown > _MOST_UNKNOWN:
        problems.append(f"and {unknown - _MOST_UNKNOWN} more unknown keys")
    try:
        config = Config.model_validate(_nest(values))
    except ValidationError as error:
        problems += [_explain(item, sources) for item in error.errors()]
        raise UserError(*problems) from None
    problems += [*check(config), *_unknown_homes(config)]
    if problems:
        raise UserError(*problems)
    return Resolved(config, sources)


def _unknown_homes(config: Config) -> Iterator[str]:
    """Yield the paths in home directories (``~user``) that do not exist on this host."""
    for key, value in flatten(to_dict(config)):
        is_path = key in text_keys() and key != "eval.prompt" and str(value).startswith("~")
        if is_path and os.path.expanduser(value) == value:
            yield f"{key}={value!r}: there is no such home directory on this host"


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, with all defaults written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _from_file(path: Path) -> _Layer:
    tree, texts = read_with_texts(path)
    return [
        (key, _as_text(key, value, texts), f"file {path}") for key, value in _flatten_known(tree)
    ]


def _as_text(key: str, value: Any, texts: Mapping[str, str]) -> Any:
    """Return the text in the file for a text key: ``2026-11-26`` and ``yes`` are names, too."""
    is_other = key in text_keys() and not isinstance(value, str | None)
    return texts.get(key, value) if is_other else value


def _flatten_known(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten a file; omit empty sections, keep a scalar in place of a section (refused later)."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flatten_known(value, f"{key}.")
        elif value is None and key in sections():
            continue
        else:
            yield key, value


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    layer = []
    for name in sorted(environ):
        if not name.startswith("JEPA_") or name in _FOREIGN_ENVIRONMENT:
            continue
        if name not in ENVIRONMENT:
            raise UserError(
                f"environment {name}: unknown switch{suggest(name, ENVIRONMENT)}; "
                f"known are {', '.join(ENVIRONMENT)}"
            )
        source = f"environment {name}"
        key = ENVIRONMENT[name]
        layer.append((key, parse_value(key, environ[name], source), source))
    return layer


def _from_command_line(overrides: Iterable[str]) -> _Layer:
    layer: list[tuple[str, Any, str]] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"command line: {item!r}: expected KEY=VALUE, e.g. jepa.lambda=0.02")
        key = key.strip()
        value = parse_value(key, text, f"command line: {key}")
        layer += [(k, v, "command line") for k, v in _flatten_known({key: value})]
    return layer


def parse_value(key: str, text: str, source: str) -> Any:
    """Return the value in ``KEY=VALUE``: the literal text if the key's type is text, a YAML value
    otherwise. Text that begins with ``[{`` is a list of sections where the key may be one.

    Raises:
        UserError: not YAML. The message begins with ``source``.
    """
    if key in text_keys() and not (key in list_keys() and text.startswith("[{")):
        return None if text == "null" and text_keys()[key] else text
    if key not in known_keys() and key not in sections():
        return text
    try:
        return parse_yaml(text)[0]
    except ValueError as error:
        raise UserError(f"{source}={_shown(text)}: not a valid value: {error}") from None


def as_override(key: str, value: Any) -> str:
    """Return the ``KEY=VALUE`` that ``load`` reads as ``value``, on one line unless it is text."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        place = tree
        for section in parents:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _unknown_key(key: str, source: str) -> str:
    if key in sections():
        return f"{source}: {key}: is a section; set its keys, e.g. {_example(key)}"
    return f"{source}: {_cut(key)}: unknown key{suggest(key, known_keys())}"


def _example(section: str) -> str:
    return next(key for key in known_keys() if key.startswith(f"{section}."))


def _explain(item: Any, sources: Mapping[str, str]) -> str:
    path = [str(part) for part in item["loc"]]
    key = next(
        (k for k in (".".join(path[:n]) for n in range(len(path), 0, -1)) if k in sources),
        ".".join(path),
    )
    place = key + _place_in_list(item["loc"][key.count(".") + 1 :])
    return f"{sources.get(key, 'configuration')}: {place}={_shown(item['input'])}: {item['msg']}"


def _place_in_list(path: Sequence[Any]) -> str:
    """Return where in a list of sections a problem is, e.g. ``[0].weight``; else nothing."""
    first = next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))
    below = path[first + 1 :]
    return f"[{path[first]}].{'.'.join(map(str, below))}" if below else ""


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def yaml_scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
