"""Members of a sweep: arms times seeds, with a check that arms differ only in what they declare.

One YAML file names a base configuration, settings of all arms (``common``), the arms (name ->
settings; one is ``control``) and the seeds. A member is one arm with one seed. Members with the
same seed are paired: initialization, data order and spans are functions of the seed (and the step)
alone, so they start from the same weights and see the same tokens in the same order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from jepa_dist.config import (
    ENVIRONMENT,
    Config,
    JepaConfig,
    ObjectiveSection,
    QuantizationConfig,
    as_override,
    flatten,
    load,
    parse_value,
    read_mapping,
    to_dict,
)
from jepa_dist.config.kinds import LAYOUT, MEASURING, WATCHING
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.files import MIB, read_json, write_atomically
from jepa_dist.monitor.evaluation_file import (
    EVALUATION,
    digest_of,
    quantized_input,
    quantized_name,
)
from jepa_dist.shipped import find_sweep

CONTROL = "control"
ADDED_SEEDS = "added_seeds.json"
"""In the folder of the run directories: seeds that ``sweep run --until-decided`` has added."""
# Set for each member; an arm must not set them.
_OF_THE_MEMBER = ("seed", "run.dir")

Settings = dict[str, Any]

# If the key has this value, keys with these prefixes have no effect.
_IDLE: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("jepa.lambda", 0, ("jepa.",)),
    ("jepa.objective", "next_latent", ("jepa.norm_floor",)),
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
# Settings of the span loss, which has no section of its own.
_OF_SPANS = (
    *("jepa.max_span_frac", "jepa.spans_per_sequence"),
    *("jepa.sampler", "jepa.within_documents"),
)


@dataclass(frozen=True)
class Member:
    """One arm with one seed."""

    index: int
    arm: str
    seed: int
    config_file: str
    """The base configuration."""
    settings: Settings
    """Its changes to the base configuration, by dotted key, including seed and run.dir."""
    declared: frozenset[str] = frozenset()
    """Keys that the arm sets."""

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return Path(self.settings["run.dir"]).expanduser()

    @property
    def arguments(self) -> list[str]:
        """Its arguments for ``jepa_dist.train``: CONFIG KEY=VALUE ..."""
        return [
            self.config_file,
            *(as_override(key, value) for key, value in self.settings.items()),
        ]

    def resolve(self) -> Config:
        """Return its configuration.

        Raises:
            UserError: the configuration is invalid.
        """
        return load(self.config_file, self.arguments[1:], {}).config


class EvaluationPlan(BaseModel):
    """Evaluations of every finished member, besides its validation set."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tasks: list[str] = []
    """Files of likelihood tasks."""
    probe: list[str] = []
    """Files of labeled documents for linear probes."""
    layer: Annotated[int, Field(ge=-1)] = -1
    """Block whose states are probed; -1: the final state."""
    quantize: list[Annotated[int, Field(ge=2, le=8)]] = []
    """Numbers of bits (``quantization.matrix_bits``) to evaluate after quantization to."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to evaluate."""
        return not (self.tasks or self.probe or self.quantize)

    def inputs(self, settings: QuantizationConfig) -> dict[str, str]:
        """Return what ``Evaluation.inputs`` of an up-to-date ``evaluation.json`` returns.

        Args:
            settings: The member's section ``quantization``.

        Raises:
            UserError: a file cannot be read.
        """
        found = {f"task/{path.stem}": digest_of(path) for path in map(Path, self.tasks)}
        for path in map(Path, self.probe):
            found[f"linear_probe/{path.stem}"] = f"{digest_of(path)} {self.layer}"
        return found | quantized_inputs(self.quantize, settings)

    def arguments(self, run_dir: Path, config: Config) -> list[str]:
        """Return the arguments of ``jepa_dist.evaluate`` for one member.

        URLs of its data are repeated there, since a run directory alone is not trusted with them.

        Args:
            run_dir: The member's.
            config: Its configuration now; the section ``quantization`` may have changed since it
                was trained.
        """
        layer = ["--layer", str(self.layer)] * bool(self.probe)
        widths = ["--quantize", *map(str, self.quantize), *_as_overrides(config.quantization)]
        keys = ("data.val", "data.tokenizer", *["data.train"] * bool(self.quantize))
        data = {key: value for key, value in flatten(to_dict(config)) if key in keys}
        return [
            str(run_dir),
            *(as_override(key, value) for key, value in data.items() if "://" in repr(value)),
            *(["--tasks", *self.tasks] * bool(self.tasks)),
            *(["--probe", *self.probe, *layer] * bool(self.probe)),
            *(widths * bool(self.quantize)),
            *("--json", str(run_dir / EVALUATION)),
        ]


def quantized_inputs(bits: Iterable[int], settings: QuantizationConfig) -> dict[str, str]:
    """Return the entries of ``Evaluation.inputs`` of quantizations to these numbers of bits."""
    return {quantized_name(each): quantized_input(settings.with_bits(each)) for each in bits}


def _as_overrides(settings: QuantizationConfig) -> list[str]:
    """Return the settings, except the evaluated bits, as KEY=VALUE."""
    values = settings.model_dump(exclude={"matrix_bits"})
    return [as_override(f"quantization.{key}", value) for key, value in values.items()]


class _SweepFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    config: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    common: Settings | None = None
    arms: dict[Any, Settings | None]
    equivalence_margin: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    evaluate: EvaluationPlan | None = None


_SEEDS = TypeAdapter(list[Annotated[int, Field(ge=0, strict=True)]])


def read_sweep(path: Path, overrides: Iterable[str] = ()) -> list[Member]:
    """Read and check a sweep; return its members, ordered by seed.

    Args:
        path: The YAML file, or the name of a shipped one. Relative paths in it are relative to the
            working directory.
        overrides: ``KEY=VALUE``, added to ``common``; ``run.dir`` is the folder of the members' run
            directories (default: ``runs/`` and the file's name). Seeds that ``add_seed`` noted
            there come after those of the file.

    Raises:
        UserError: one line for each problem.
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
    seeds = dict.fromkeys([*sweep.seeds, *_added_seeds(folder.expanduser())])
    members = [
        Member(
            index,
            arm,
            seed,
            sweep.config,
            {"run.dir": str(folder / f"{arm}-seed{seed}"), "seed": seed, **common, **arms[arm]},
            frozenset(arms[arm]),
        )
        for index, (seed, arm) in enumerate(itertools.product(seeds, arms))
    ]
    problems = [*_unlike(members[: len(arms)], arms)]
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return members


def read_margins(path: Path) -> dict[str, float]:
    """Return a sweep's ``equivalence_margin``, by metric.

    Raises:
        UserError: as ``read_sweep``.
    """
    return _parse(find_sweep(path)).equivalence_margin or {}


def read_plan(path: Path) -> EvaluationPlan | None:
    """Return a sweep's ``evaluate`` section; None without one.

    Raises:
        UserError: as ``read_sweep``, or a file of the section cannot be read.
    """
    plan = _parse(find_sweep(path)).evaluate
    if plan is None or plan.is_empty:
        return None
    plan.inputs(QuantizationConfig())
    return plan


def read_widths(path: Path) -> list[int]:
    """Return the numbers of bits that a sweep's members are quantized to.

    Raises:
        UserError: as ``read_sweep``, or the file names none.
    """
    path = find_sweep(path)
    plan = _parse(path).evaluate
    if plan is None or not plan.quantize:
        raise UserError(
            f"results --quantized: {path} names no numbers of bits; add them to its section "
            "evaluate (quantize: [4, 6]), then: jepa_dist sweep evaluate FILE"
        )
    return plan.quantize


def add_seed(members: Sequence[Member]) -> None:
    """Note one more seed, in the folder of the members' run directories: the highest, plus 1."""
    folder = members[0].run_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [*_added_seeds(folder), max(member.seed for member in members) + 1]
    write_atomically(folder / ADDED_SEEDS, json.dumps(seeds) + "\n")


def _added_seeds(folder: Path) -> list[int]:
    file = folder / ADDED_SEEDS
    try:
        return _SEEDS.validate_python(read_json(file, MIB))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: expected a list of seeds; correct it or remove it") from None


# ---------------------------------------------------------------------------- reading


def _refuse_switches(environ: Mapping[str, str]) -> None:
    """Raise if an environment variable overrides a setting: it would affect only the arms that do
    not set it."""
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
        problems = [f"{path}: {field} (a sweep has {known})" for field in invalid_fields(error)]
        raise UserError(*problems) from None


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
    """Yield problems of the file: missing, misplaced or duplicate entries."""
    if CONTROL not in arms:
        yield f"arms: {CONTROL!r} is missing, with which all others are compared"
    if len(arms) < 2:
        yield "arms: at least one besides the control is needed"
    if len(set(seeds)) < len(seeds):
        yield f"seeds: {seeds}: each may be given once"
    if "seed" in common:
        yield "common: seed: is set for each member; list it under seeds"
    for name, settings in arms.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)):
            yield (
                f"arm {name!r}: expected a name of letters, digits, - and _, in quotes if YAML "
                "would parse it as another type"
            )
        for key in settings:
            if key in _OF_THE_MEMBER:
                yield f"arm {name}: {key}: is set for each member; an arm cannot"
            if key in common:
                yield f"arm {name}: {key}: is set in common, too; set it in one place"


def _unlike(members: list[Member], arms: Mapping[str, Settings]) -> Iterable[str]:
    """Yield problems of the arms' resolved configurations (all with one seed), compared with the
    control and each other."""
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
    """Return the settings that affect training."""
    idle = (
        WATCHING
        + MEASURING
        + LAYOUT
        + _of_other_objectives(settings["jepa.objective"])
        + tuple(
            beginning
            for key, value, beginnings in _IDLE
            if settings[key] == value
            for beginning in beginnings
        )
    )
    kept = {key: value for key, value in settings.items() if not key.startswith(idle)}
    return {**kept, "jepa.lambda": settings["jepa.lambda"]}


def _of_other_objectives(objective: str) -> tuple[str, ...]:
    """Return the beginnings of the keys that concern only other objectives than this one."""
    sections = (
        name
        for name, field in JepaConfig.model_fields.items()
        if isinstance(field.default, ObjectiveSection)
    )
    others = tuple(f"jepa.{name}." for name in sections if name != objective)
    return others if objective == "span" else others + _OF_SPANS


def settings_of(config: Config) -> Settings:
    """Return all settings by dotted key, except those that are set for each member."""
    return {key: v for key, v in flatten(to_dict(config)) if key not in _OF_THE_MEMBER}
