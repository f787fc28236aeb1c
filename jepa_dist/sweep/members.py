"""The list of a sweep: arms times seeds, checked so that arms differ in what they declare only.

One YAML file names a base configuration, what all arms change in it (``common``), the arms (name
-> settings; one is ``control``) and the seeds. A member is one arm at one seed. Members of one
seed are paired: initialisation, order of the data and spans are functions of the seed (and the
step) alone, so they start from the same weights and see the same tokens in the same order.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_dist.config import (
    ENVIRONMENT,
    Config,
    as_override,
    flatten,
    load,
    parse_value,
    read_mapping,
    to_dict,
)
from jepa_dist.config.kinds import LAYOUT, MEASURING, WATCHING
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.shipped import find_sweep

CONTROL = "control"
# What a member has of its own: an arm must not set it.
_OF_THE_MEMBER = ("seed", "run.dir")

Settings = dict[str, Any]

# What a setting makes idle: if the key has this value, the keys with these beginnings do nothing.
_IDLE: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("jepa.lambda", 0, ("jepa.",)),
    ("jepa.objective", "span", ("jepa.next_state.",)),
    (
        *("jepa.objective", "next_state"),
        ("jepa.max_span_frac", "jepa.spans_per_sequence", "jepa.sampler", "jepa.within_documents"),
    ),
    ("optim.matrix", "adamw", ("optim.muon_",)),
    ("model.tie_embeddings", True, ("optim.embed_lr", "optim.head_lr")),
    ("model.tie_embeddings", False, ("optim.tied_embed_lr", "model.tied_embed_init_std")),
    (
        *("model.num_loops", 0),
        ("model.loop_", "train.enable_looping_at", "train.loop_phase2_at"),
    ),
    ("optim.muon_momentum_warmup_steps", 0, ("optim.muon_momentum_warmup_start",)),
    ("optim.warmdown_frac", 0, ("optim.min_lr",)),
)


@dataclass(frozen=True)
class Member:
    """One arm at one seed."""

    index: int
    arm: str
    seed: int
    config_file: str
    """The base configuration."""
    settings: Settings
    """What it changes in that: dotted keys, seed and run.dir among them."""
    declared: frozenset[str] = frozenset()
    """The keys that make the arm."""

    @property
    def run_dir(self) -> Path:
        """Where it lives."""
        return Path(self.settings["run.dir"]).expanduser()

    @property
    def arguments(self) -> list[str]:
        """What to give to ``jepa_dist.train``: CONFIG KEY=VALUE ..."""
        return [
            self.config_file,
            *(as_override(key, value) for key, value in self.settings.items()),
        ]

    def resolve(self) -> Config:
        """Its configuration.

        Raises:
            UserError: there is none.
        """
        return load(self.config_file, self.arguments[1:], {}).config


class _SweepFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    config: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    common: Settings | None = None
    arms: dict[Any, Settings | None]


def read_sweep(path: Path, overrides: Iterable[str] = ()) -> list[Member]:
    """Read and check a sweep; members of one seed stand together.

    Args:
        path: The YAML file, or the name of a shipped one. Relative paths in it are seen from the
            working directory.
        overrides: ``KEY=VALUE``, added to what all arms have in common; ``run.dir`` is the folder
            that holds the members' run directories (default: ``runs/`` and the file's name).

    Raises:
        UserError: everything that is wrong with it, at once.
    """
    _refuse_switches(os.environ)
    path = find_sweep(path)
    sweep = _parse(path)
    common = dict(flatten(sweep.common or {})) | _split(overrides)
    arms = {name: dict(flatten(settings or {})) for name, settings in sweep.arms.items()}
    problems = [*_misplaced(arms, common, sweep.seeds)]
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    folder = Path(common.pop("run.dir", Path("runs") / path.stem))
    members = [
        Member(
            index,
            arm,
            seed,
            sweep.config,
            {"run.dir": str(folder / f"{arm}-seed{seed}"), "seed": seed, **common, **arms[arm]},
            frozenset(arms[arm]),
        )
        for index, (seed, arm) in enumerate(itertools.product(sweep.seeds, arms))
    ]
    problems = [*_unlike(members[: len(arms)], arms)]
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return members


# ---------------------------------------------------------------------------- reading


def _refuse_switches(environ: Mapping[str, str]) -> None:
    """A switch in the environment would reach the arms that do not set it, and only those."""
    given = [name for name in ENVIRONMENT if name in environ]
    if given:
        raise UserError(
            f"environment {', '.join(given)}: a sweep's settings come from its file; unset it"
        )


def _parse(path: Path) -> _SweepFile:
    try:
        return _SweepFile.model_validate(read_mapping(path))
    except ValidationError as error:
        known = ", ".join(_SweepFile.model_fields)
        told = [f"{path}: {field} (a sweep has {known})" for field in invalid_fields(error)]
        raise UserError(*told) from None


def _split(overrides: Iterable[str]) -> Settings:
    settings = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"command line: {item!r}: expected KEY=VALUE, e.g. train.steps=100")
        key = key.strip()
        settings[key] = parse_value(key, text, f"command line: {key}")
    return settings


# ---------------------------------------------------------------------------- checks


def _misplaced(arms: Mapping[str, Settings], common: Settings, seeds: list[int]) -> Iterable[str]:
    """What is said in the wrong place, or not at all."""
    if CONTROL not in arms:
        yield f"arms: none is called {CONTROL!r}, with which all others are compared"
    if len(arms) < 2:
        yield "arms: at least one besides the control is needed"
    if len(set(seeds)) < len(seeds):
        yield f"seeds: {seeds}: each may be given once"
    if "seed" in common:
        yield "common: seed: is set for each member; list it under seeds"
    for name, settings in arms.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)):
            yield (
                f"arm {name!r}: must be a name of letters, digits, - and _, in quotes where YAML "
                "takes it for something else"
            )
        for key in settings:
            if key in _OF_THE_MEMBER:
                yield f"arm {name}: {key}: is set for each member; an arm cannot"
            if key in common:
                yield f"arm {name}: {key}: is common to all arms; say it in one place"


def _unlike(members: list[Member], arms: Mapping[str, Settings]) -> Iterable[str]:
    """Compare the arms as they resolve (all at one seed) with the control and each other."""
    resolved: dict[str, Settings] = {}
    problems: dict[str, list[str]] = {}
    for member in members:
        try:
            resolved[member.arm] = _resolve_comparable(member)
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(problem.removeprefix("command line: "), []).append(member.arm)
    for problem, names in problems.items():
        yield f"arm {', '.join(names)}: {problem}"
    if not problems:
        yield from _undeclared(resolved, arms)
        yield from _alike(resolved)


def _resolve_comparable(member: Member) -> Settings:
    config = member.resolve()
    if config.train.max_wallclock_seconds is not None:
        raise UserError(
            "train.max_wallclock_seconds: runs that end by the clock take different numbers of "
            "steps and cannot be paired; set it to null, and train.steps, in common"
        )
    return settings_of(config)


def _undeclared(resolved: Mapping[str, Settings], arms: Mapping[str, Settings]) -> Iterable[str]:
    control = resolved[CONTROL]
    for name, settings in resolved.items():
        for key in settings:
            if settings[key] != control[key] and key not in arms[name]:
                yield (
                    f"arm {name}: {key}: is {settings[key]!r} and the control's {control[key]!r}, "
                    "without being declared by the arm; declare it there, or move it to common"
                )


def _alike(resolved: Mapping[str, Settings]) -> Iterable[str]:
    for (first, one), (second, other) in itertools.combinations(resolved.items(), 2):
        if _effective(one) == _effective(other):
            yield f"arms {first} and {second}: train the same model; each must change something"


def _effective(settings: Settings) -> Settings:
    """Without what trains nothing."""
    idle = (
        WATCHING
        + MEASURING
        + LAYOUT
        + tuple(
            beginning
            for key, value, beginnings in _IDLE
            if settings[key] == value
            for beginning in beginnings
        )
    )
    kept = {key: value for key, value in settings.items() if not key.startswith(idle)}
    return {**kept, "jepa.lambda": settings["jepa.lambda"]}


def settings_of(config: Config) -> Settings:
    """All dotted keys, without what each member has of its own."""
    return {key: v for key, v in flatten(to_dict(config)) if key not in _OF_THE_MEMBER}
