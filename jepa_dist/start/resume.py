"""Find where to start: at step 0, at the run's newest checkpoint, or at another run's checkpoint.

With ``checkpoint.resume=auto`` (the default) the same command resumes the run. Another world size,
mesh, precision or JEPA setting is accepted and printed; another model, seed or data set is
rejected, with the differences listed (exact resume; early, clear errors on every rank).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jepa_dist.checkpoint import find_resumable
from jepa_dist.checkpoint.folder import LATEST, published
from jepa_dist.checkpoint.loading import verify_together
from jepa_dist.checkpoint.manifest import STATE, read_manifest, read_state
from jepa_dist.checkpoint.mirror import fetch_newest
from jepa_dist.config import Config, flatten, load, to_dict, to_yaml
from jepa_dist.config.kinds import MEASURING, WATCHING
from jepa_dist.errors import UserError, one_line
from jepa_dist.monitor.run_dir import check_run_files, read_status, write_run_dir
from jepa_dist.parallel.world import World
from jepa_dist.run.lock import LOCK_NAME
from jepa_dist.run.progress import Progress, RunState, run_state

# Keys that must not change when a run resumes: exact names, or prefixes that end with a dot.
_ESSENTIAL = ("seed", "model.", "optim.matrix", "data.tokenizer")


@dataclass(frozen=True)
class Start:
    """The state that a start begins with."""

    checkpoint: Path | None
    """A verified checkpoint that fits the configuration; None starts at step 0."""
    step: int
    """Optimizer steps completed in the checkpoint."""
    seconds: float
    """Training time in the checkpoint."""
    is_finished: bool
    """Whether the run is already finished."""
    messages: tuple[str, ...]
    """Messages for the user."""
    decay_from: float | None = None
    """Where the decay of the learning rates begins, if the configuration says "now"."""

    def resolve(self, config: Config) -> Config:
        """Return the configuration with the fraction that ``schedule.decay_from=now`` means."""
        return config if self.decay_from is None else _with_decay(config, self.decay_from)


def _with_decay(config: Config, start: float) -> Config:
    schedule = config.schedule.model_copy(update={"decay_from": start})
    return config.model_copy(update={"schedule": schedule})


def _decay_from(config: Config, state: RunState) -> float | None:
    """Return the fraction that ``schedule.decay_from=now`` means for a run that continues a state.

    A branch begins its decay at the end of the checkpoint that it starts from; its own checkpoints
    store that fraction.
    """
    if config.schedule.decay_from != "now":
        return None
    before = dict(flatten(state.config)).get("schedule.decay_from")
    if config.checkpoint.resume == "auto" and isinstance(before, float):
        return before
    progress, limit = state.progress, config.train.max_wallclock_seconds
    done = progress.step / config.train.steps if limit is None else progress.seconds / limit
    return min(done, 1.0)


def find_start(
    config: Config,
    run_dir: Path,
    data_fingerprint: str,
    world: World,
    validation_fingerprint: str | None = None,
) -> Start:
    """Decide where to begin. Collective; the result is the same on every rank.

    Args:
        config: The run's configuration now.
        run_dir: Its directory, which may hold an earlier part of it.
        data_fingerprint: Digest of the training data now (rank 0's is used).
        world: The ranks.
        validation_fingerprint: Identifies the validation data now; None skips the comparison.

    Raises:
        UserError: on every rank, for a directory or checkpoint that does not fit or is damaged.
    """
    mode, now = config.checkpoint.resume, (data_fingerprint, validation_fingerprint)
    mirror, copied = config.checkpoint.mirror, []
    if mode == "auto" and mirror is not None:
        copied = world.run_on_main(lambda: fetch_newest(mirror, run_dir / "checkpoints"))
    occupied = world.run_on_main(lambda: _is_occupied(run_dir))
    if mode != "auto":
        if occupied:
            raise UserError(
                f"run.dir={run_dir}: exists already and is not overwritten; name another one "
                "(run.dir=...), or resume it (checkpoint.resume=auto)"
            )
        if mode == "never":
            _refuse_now(config)
            return Start(None, 0, 0.0, False, ())
        named = Path(mode).expanduser()
        folder = world.run_on_main(lambda: _folder_of_checkpoints(named))
        if folder is not None:
            return _start_at_newest(Path(folder), named, config, now, world)
        verify_together(named, world)
        return _start_at(named, (), config, now, world)
    if not occupied:
        _refuse_now(config)
        return Start(None, 0, 0.0, False, tuple(copied))
    world.run_on_main(lambda: check_run_files(run_dir))
    found = find_resumable(run_dir / "checkpoints", world)
    if found.path is not None:
        return _start_at(found.path, (*copied, *found.messages), config, now, world)
    if found.messages:
        raise UserError(
            *found.messages,
            f"run.dir={run_dir}: all of its checkpoints are damaged; name another run.dir to start "
            "a new run",
        )
    _refuse_now(config)
    world.run_on_main(lambda: _refuse_unless_same(run_dir, config))
    message = f"{run_dir}: stopped before its first checkpoint; starting at step 0"
    return Start(None, 0, 0.0, False, (*copied, message))


def _refuse_now(config: Config) -> None:
    """Raise if ``schedule.decay_from=now`` is used without a checkpoint to start from."""
    if config.schedule.decay_from == "now":
        raise UserError(
            "schedule.decay_from=now: there is no checkpoint that the decay could begin at; name "
            "one (checkpoint.resume=PATH), or give a fraction of the run"
        )


def _folder_of_checkpoints(named: Path) -> str | None:
    """Return the folder of checkpoints at ``named``; None if it is a single checkpoint.

    Raises:
        UserError: it is not something that a run can resume from.
    """
    if named.name == LATEST and not named.is_dir():
        return str(named.parent)
    if (named / "checkpoints").is_dir():
        return str(named / "checkpoints")
    if named.is_dir() and published(named):
        return str(named)
    if named.is_dir():
        return None
    key = f"checkpoint.resume={named}"
    if not named.exists():
        raise UserError(
            f"{key}: no such folder; python -m jepa_dist.checkpoint ls RUN lists the checkpoints "
            "of a run (expected one of them, auto, or never)"
        )
    raise UserError(
        f"{key}: is a file; expected the folder of a checkpoint, e.g. "
        "runs/a/checkpoints/step_00001000, or a run directory (exported weights hold no optimizer "
        "state to continue from)"
    )


def _start_at_newest(
    folder: Path, named: Path, config: Config, fingerprints: tuple[str, str | None], world: World
) -> Start:
    found = find_resumable(folder, world)
    if found.path is None:
        raise UserError(*found.messages, f"checkpoint.resume={named}: holds no intact checkpoint")
    return _start_at(found.path, found.messages, config, fingerprints, world)


def _start_at(
    checkpoint: Path,
    messages: tuple[str, ...],
    config: Config,
    fingerprints: tuple[str, str | None],
    world: World,
) -> Start:
    def compare() -> tuple[dict[str, Any], list[str], float | None]:
        state = run_state(checkpoint / STATE, read_state(checkpoint))
        if state.progress.step != read_manifest(checkpoint).step:
            raise UserError(
                f"{checkpoint / STATE}: step {state.progress.step} differs from the manifest's; "
                "use another checkpoint"
            )
        decay_from = _decay_from(config, state)
        now = config if decay_from is None else _with_decay(config, decay_from)
        changes = differences(checkpoint, state, now, *fingerprints)
        return asdict(state.progress), changes, decay_from

    found, changes, decay_from = world.run_on_main(compare)
    progress = Progress(**found)
    step = progress.step
    is_finished = world.run_on_main(lambda: _is_finished(config, progress))
    message = (
        f"{config.run.dir}: finished already, after step {step}; nothing to do"
        if is_finished
        else f"resuming from {checkpoint}, after step {step}"
    )
    lines = (*messages, *changes, message)
    return Start(checkpoint, step, progress.seconds, is_finished, lines, decay_from)


def _is_finished(config: Config, progress: Progress) -> bool:
    """Return whether all steps, and the export after them, are done."""
    step, limit = progress.step, config.train.max_wallclock_seconds
    is_complete = step >= config.train.steps or (limit is not None and progress.seconds >= limit)
    status = read_status(Path(config.run.dir).expanduser())
    return is_complete and (status.get("state"), status.get("step")) == ("finished", step)


def differences(
    checkpoint: Path,
    state: RunState,
    config: Config,
    data_fingerprint: str,
    validation_fingerprint: str | None = None,
) -> list[str]:
    """Return one line for each key that changed since the checkpoint and may change.

    Raises:
        UserError: one line for each key that changed and must not.
    """
    before, now = dict(flatten(state.config)), dict(flatten(to_dict(config)))
    changed = [
        one_line(f"{key}: was {before.get(key)!r:.200}, is {now.get(key)!r}")
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    refused = [line for line in changed if _starts(line, _ESSENTIAL)]
    averages = [settings.get("optim.ema_decay", 0.0) > 0 for settings in (before, now)]
    if averages[0] != averages[1]:
        refused.append(
            f"optim.ema_decay: was {before.get('optim.ema_decay')!r}, is "
            f"{now['optim.ema_decay']!r}: the moving average covers a whole run and cannot be "
            f"switched {'off' if averages[0] else 'on'} within it"
        )
    if state.data_fingerprint != data_fingerprint and not config.checkpoint.allow_other_data:
        refused.append(
            "data.train: not the shards that it was trained on, or mixed in another way "
            "(checkpoint.allow_other_data=true accepts them)"
        )
    if refused:
        raise UserError(
            *(f"{checkpoint}: cannot resume from it: {line}" for line in refused),
            "use the run's own settings, or start a new run in another run.dir",
        )
    accepted = [x for x in changed if not x.startswith(WATCHING + MEASURING + ("data.",))]
    if None not in (state.validation_fingerprint, validation_fingerprint) and (
        state.validation_fingerprint != validation_fingerprint
    ):
        accepted.append(
            "the validation data (data.val, eval.sequences): val/* are not comparable with earlier "
            "values, which reports omit"
        )
    return [f"changed since the checkpoint: {x}" for x in accepted]


def open_run_dir(run_dir: Path, config: Config, data: Mapping[str, Any]) -> None:
    """Create the run directory, or update the files of an existing one; on rank 0.

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
    """Raise unless a run directory without checkpoints was created with this same configuration."""
    try:
        # Resolved, so that keys of later versions have their defaults.
        before = load(run_dir / "config.yaml", environ={}).config
    except UserError:
        before = None
    if before != config:
        raise UserError(
            f"run.dir={run_dir}: exists already, holds no checkpoint and was not made by this "
            "configuration; it is not overwritten: name another one (run.dir=...)"
        )
