"""Where a run begins: anew, where its newest checkpoint left it, or at another run's checkpoint.

``checkpoint.resume=auto`` (the default) makes the same command, typed again, go on where the run
was. Another world size, mesh, precision or JEPA setting is fine and is told; another model, seed
or data set is refused with the difference listed (contracts C5, C7).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jepa_dist.checkpoint import find_resumable
from jepa_dist.checkpoint.loader import verify_together
from jepa_dist.checkpoint.manifest import read_state
from jepa_dist.config import Config, flatten, to_dict, to_yaml
from jepa_dist.errors import UserError
from jepa_dist.monitor.run_dir import read_status, write_run_dir
from jepa_dist.parallel.world import World
from jepa_dist.run_lock import LOCK_NAME

# Keys that a checkpoint cannot go on without being the same, by the beginning of their names.
_ESSENTIAL = ("seed", "model.", "optim.matrix", "data.tokenizer")
# Keys that say where things are and when to save or stop, not what the run is.
_INCIDENTAL = (
    *("run.", "checkpoint.", "data.", "eval.", "monitor."),
    *("train.stop_at", "train.log_every", "train.max_bad_steps"),
)


@dataclass(frozen=True)
class Start:
    """Where to begin."""

    checkpoint: Path | None
    """Known to be whole and to fit; None begins anew."""
    step: int
    """Optimiser steps done by then."""
    is_finished: bool
    """Whether there is nothing left to do."""
    messages: tuple[str, ...]
    """What the user should know."""


def find_start(config: Config, run_dir: Path, data_fingerprint: str, world: World) -> Start:
    """Decide where to begin. Collective; the same on every rank.

    Args:
        config: The run as it is asked for now.
        run_dir: Its directory, which may hold an earlier part of it.
        data_fingerprint: Of the training data now (rank 0's counts).
        world: The ranks.

    Raises:
        UserError: on every rank: a directory or checkpoint that does not fit, or is damaged.
    """
    mode = config.checkpoint.resume
    occupied = world.decide(lambda: _is_occupied(run_dir))
    if mode != "auto":
        if occupied:
            raise UserError(
                f"run.dir={run_dir}: exists already and is not overwritten; name another one "
                "(run.dir=...), or go on with it (checkpoint.resume=auto)"
            )
        if mode == "never":
            return Start(None, 0, False, ())
        verify_together(Path(mode), world)
        return _start_at(Path(mode), (), config, data_fingerprint, world)
    if not occupied:
        return Start(None, 0, False, ())
    found = find_resumable(run_dir / "checkpoints", world)
    if found.path is not None:
        return _start_at(found.path, found.messages, config, data_fingerprint, world)
    if found.messages:
        raise UserError(
            *found.messages,
            f"run.dir={run_dir}: none of its checkpoints is whole; name another run.dir to begin "
            "anew",
        )
    world.decide(lambda: _refuse_unless_same(run_dir, config))
    told = f"{run_dir}: stopped before its first checkpoint; beginning anew"
    return Start(None, 0, False, (told,))


def _start_at(
    checkpoint: Path,
    messages: tuple[str, ...],
    config: Config,
    data_fingerprint: str,
    world: World,
) -> Start:
    def compare() -> tuple[dict[str, Any], list[str]]:
        state = read_state(checkpoint)
        return state, differences(checkpoint, state, config, data_fingerprint)

    state, changes = world.decide(compare)
    step = state["step"]
    is_finished = world.decide(lambda: _is_finished(config, state))
    told = (
        f"{config.run.dir}: finished already, after step {step}; nothing to do"
        if is_finished
        else f"going on from {checkpoint}, after step {step}"
    )
    return Start(checkpoint, step, is_finished, (*messages, *changes, told))


def _is_finished(config: Config, state: Mapping[str, Any]) -> bool:
    """Whether all steps are done and what follows them (export, status) is, too."""
    step, limit = state["step"], config.train.max_wallclock_seconds
    is_complete = step >= config.train.steps or (limit is not None and state["seconds"] >= limit)
    status = read_status(Path(config.run.dir).expanduser())
    return is_complete and (status.get("state"), status.get("step")) == ("finished", step)


def differences(
    checkpoint: Path, state: Mapping[str, Any], config: Config, data_fingerprint: str
) -> list[str]:
    """What is not as it was, one line per key that may change.

    Raises:
        UserError: what must not change did; all of it.
    """
    before, now = dict(flatten(state["config"])), dict(flatten(to_dict(config)))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    refused = [line for line in changed if _starts(line, _ESSENTIAL)]
    if state["data_fingerprint"] != data_fingerprint and not config.checkpoint.allow_other_data:
        refused.append(
            "data.train: not the shards that it was trained on (checkpoint.allow_other_data=true "
            "goes on with these)"
        )
    if refused:
        raise UserError(
            *(f"{checkpoint}: cannot go on from it: {line}" for line in refused),
            "give it the run's own settings, or begin anew in another run.dir",
        )
    return [f"changed since the checkpoint: {x}" for x in changed if not _starts(x, _INCIDENTAL)]


def open_run_dir(run_dir: Path, config: Config, data: Mapping[str, Any]) -> None:
    """Make the run directory, or take it up again; on rank 0.

    Raises:
        UserError: it cannot be written.
    """
    files = {"config.yaml": to_yaml(config), "data.json": json.dumps(data, indent=1) + "\n"}
    write_run_dir(run_dir, files)


def _starts(line: str, beginnings: tuple[str, ...]) -> bool:
    key = line.partition(":")[0]
    return any(key == b or (b.endswith(".") and key.startswith(b)) for b in beginnings)


def _is_occupied(run_dir: Path) -> bool:
    if not run_dir.is_dir():
        return run_dir.exists()
    return any(LOCK_NAME not in path.name for path in run_dir.iterdir())


def _refuse_unless_same(run_dir: Path, config: Config) -> None:
    """A directory without checkpoints is gone on with only by the very run that made it."""
    try:
        before = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        before = None
    if before != yaml.safe_load(to_yaml(config)):
        raise UserError(
            f"run.dir={run_dir}: exists already, holds no checkpoint and was not made by this "
            "configuration; it is not overwritten: name another one (run.dir=...)"
        )
