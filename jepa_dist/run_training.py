"""A rank of a training run, from the process group to the end of the process."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_dist.build import chosen_attention
from jepa_dist.checkpoint import Checkpointer, RetentionPolicy, SaveReport
from jepa_dist.checkpoint.agreement import on_every_rank
from jepa_dist.checkpoint.mirror import NoMirror, open_mirror
from jepa_dist.config import Config, ParallelConfig, to_dict
from jepa_dist.data.sources import describe_mixture
from jepa_dist.errors import TrainingError
from jepa_dist.evaluate.weights import find_initial
from jepa_dist.model.summary import model_summary
from jepa_dist.monitor.device_memory import explain_out_of_memory
from jepa_dist.monitor.peers import Peers
from jepa_dist.monitor.profiler import StepProfiler
from jepa_dist.monitor.reporter import Reporter
from jepa_dist.monitor.run_dir import log_to_run_dir, record_failure
from jepa_dist.monitor.startup import Startup
from jepa_dist.monitor.watchdog import Watchdog
from jepa_dist.parallel.determinism import EXCLUDED
from jepa_dist.parallel.world import World, record_collectives, start_world, stop_world
from jepa_dist.process.dist_env import launched_rank
from jepa_dist.process.failure import exit_on_rank_error, exit_on_user_error
from jepa_dist.run.consistency import Statement
from jepa_dist.run.lock import RunLock
from jepa_dist.start.capacity import check_memory
from jepa_dist.start.resume import Start, find_start, open_run_dir
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.baselines import Baselines
from jepa_dist.training.listeners import Silent
from jepa_dist.training.loop import Outcome, Trainer
from jepa_dist.training.records import facts

# At the end of a run, the last upload may take this long.
_UPLOAD_SECONDS = 600.0
_CHECKPOINTS = "checkpoints"


def run_training(
    config: Config, data: Mapping[str, Any], mine: Statement, startup: Startup
) -> None:
    """Create the process group and train until the run is finished or asked to stop.

    Args:
        config: The run's configuration.
        data: Fingerprints of the shards by split.
        mine: This rank's statement of what must be identical on all ranks.
        startup: Measures what this start costs.
    """
    rank, run_dir = launched_rank(), Path(config.run.dir).expanduser()
    record_collectives(run_dir / "logs")
    with exit_on_rank_error(rank):
        world = start_world(config.parallel, mine)
    startup.done("process_group")
    lock = RunLock(run_dir)
    with _exit_on_error(rank, lock):
        run = _open_run(config, data, world, lock)
    if not run.start.is_finished:
        _train(run, startup)
    stop_world()
    run.mirror.close(_UPLOAD_SECONDS)
    for line in run.mirror.take_messages():
        print(line)
    lock.release()


@contextmanager
def _exit_on_error(rank: int, lock: RunLock) -> Iterator[None]:
    """Exit on any error before training, of all ranks or of this one alone."""
    with (
        exit_on_rank_error(rank, on_failure=lambda reason: lock.release()),
        exit_on_user_error(rank, on_failure=lock.release),
    ):
        yield


# ---------------------------------------------------------------------------- before training


@dataclass(frozen=True)
class _Run:
    """A run whose directory this start has locked."""

    config: Config
    data: Mapping[str, Any]
    """Fingerprints of the shards by split."""
    validated_on: str
    """Identifies the validation data."""
    directory: Path
    world: World
    lock: RunLock
    start: Start
    attention: str
    """Name of the attention kernel."""
    keep: RetentionPolicy
    mirror: NoMirror

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint stores of the run besides its state."""
        return {
            "config": to_dict(self.config),
            "data_fingerprint": self.data["train"]["digest"],
            "validation_fingerprint": self.validated_on,
        }


def _open_run(config: Config, data: Mapping[str, Any], world: World, lock: RunLock) -> _Run:
    """Run the checks that need a device, lock the run directory, find where to begin. Collective.

    Raises:
        UserError: on every rank, if the run cannot begin.
    """
    directory = Path(config.run.dir).expanduser()
    validated_on = f"{data['val']['digest']}:{config.eval.sequences}"
    attention = chosen_attention(config.model, config.parallel, world.device)
    on_every_rank(lambda: check_memory(config, world), world)
    messages = world.run_on_main(lock.acquire)
    start = find_start(config, directory, data["train"]["digest"], world, validated_on)
    config = start.resolve(config)
    if world.is_main:
        for line in (*messages, *start.messages):
            print(line)
    if start.checkpoint is None and config.train.init_from is not None:
        _check_initial_weights(config.train.init_from, config, world)
    keep = RetentionPolicy(config.checkpoint.keep_last, config.checkpoint.keep_every)
    mirror = open_mirror(config.checkpoint.mirror if world.is_main else None, keep)
    if start.checkpoint is not None and start.checkpoint.parent == directory / _CHECKPOINTS:
        mirror.submit(start.checkpoint)  # an earlier upload may have been cut off
    return _Run(config, data, validated_on, directory, world, lock, start, attention, keep, mirror)


def _check_initial_weights(named: str, config: Config, world: World) -> None:
    on_every_rank(lambda: find_initial(Path(named).expanduser(), config), world)
    if world.is_main:
        print(f"initial weights: {named}")


def _open_directory(run: _Run) -> tuple[Checkpointer, Peers]:
    """Make the run directory ready for writing. Collective.

    Raises:
        SharedError: on every rank, if it cannot be written.
    """
    world = run.world
    world.run_on_main(lambda: open_run_dir(run.directory, run.config, run.data))
    checkpointer = Checkpointer(run.directory / _CHECKPOINTS, world, run.keep)
    peers = Peers(run.directory, world.rank, world.run_on_main(lambda: uuid.uuid4().hex))
    if world.is_main:
        peers.remove_old_reports()
    return checkpointer, peers


# ---------------------------------------------------------------------------- training


def _train(run: _Run, startup: Startup) -> None:
    """Train until the run is finished or asked to stop; save and publish the results."""
    rank, world = run.world.rank, run.world
    with _exit_on_error(rank, run.lock):
        checkpointer, peers = _open_directory(run)
    startup.done("find_checkpoint")
    give_up = functools.partial(_give_up, run, peers)
    snapshot = run.config.monitor.memory_snapshot
    with (
        exit_on_rank_error(rank, on_failure=give_up),
        explain_out_of_memory(run.directory, rank, snapshot=snapshot),
    ):
        log_to_run_dir(run.directory, rank)
        reporter = _open_reporter(run) if world.is_main else _NoReporter()
        checkpointer.on_published = functools.partial(_report_save, reporter, run.mirror)
        trainer = build_trainer(
            run.config,
            world,
            checkpointer,
            run.start.checkpoint,
            run.identity,
            startup,
            on_stop=peers.leave_if_local_rank_ended,
            on_give_up=give_up,
        )
        _describe(run, trainer, reporter)
        with (
            _watchdog(run, trainer, peers),
            StepProfiler(run.config.monitor.profile, run.directory, rank) as profiler,
        ):
            baselines = _baselines(run, trainer, reporter)
            outcome = _run_trainer(trainer, reporter, profiler)
            checkpointer.close()
            if outcome.finished:
                trainer.export(run.directory, outcome)
        compared = baselines() if outcome.finished else {}
        reporter.finish(outcome.summary() | compared)


def _give_up(run: _Run, peers: Peers, reason: str) -> None:
    """Record why this rank fails, for its peers and the next start."""
    peers.report_failure(reason)
    try:
        record_failure(run.directory, run.world.rank, reason)
    finally:
        run.lock.release()


def _run_trainer(
    trainer: Trainer, reporter: Reporter | _NoReporter, profiler: StepProfiler
) -> Outcome:
    try:
        return trainer.run(reporter, profiler)
    except TrainingError as error:
        reporter.diverged(error.problems[0])
        raise


def _watchdog(run: _Run, trainer: Trainer, peers: Peers) -> Watchdog:
    return Watchdog(
        run.directory,
        run.world.rank,
        run.world.world_size,
        lambda: trainer.times.meter.place,
        run.config.monitor.late_seconds,
        look=peers.leave_if_reported,
    )


def _baselines(
    run: _Run, trainer: Trainer, reporter: Reporter | _NoReporter
) -> Callable[[], dict[str, Any]]:
    """Start computing the n-gram baselines on rank 0; return the function that waits for them."""
    if not run.world.is_main:
        return dict
    evaluation = trainer.evaluation
    return Baselines(run.config, evaluation.validation, evaluation.tokenizer, reporter.say).values


# ---------------------------------------------------------------------------- reporting


class _NoReporter(Silent):
    """A reporter for ranks other than 0 that ignores everything."""

    def text(self, tag: str, text: str) -> None:
        """Ignore the text."""

    def saved(self) -> None:
        """Ignore the save."""

    def diverged(self, reason: str) -> None:
        """Ignore the divergence."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ignore the end."""


def _open_reporter(run: _Run) -> Reporter:
    reporter = Reporter(
        run.directory,
        run.config,
        run.start.step,
        run.world.world_size,
        train_seconds=run.start.seconds,
        facts={**facts(run.config, run.world.device), "parallel.attention": run.attention},
    )
    reporter.say(_kernels(run.config.parallel, run.attention))
    return reporter


def _kernels(config: ParallelConfig, attention: str) -> str:
    """Return one line that names the kernels of this start."""
    line = f"attention kernel: {attention} (parallel.attention={config.attention})"
    excluded = f"; deterministic algorithms only, without {EXCLUDED}"
    return line + excluded * config.deterministic


def _describe(run: _Run, trainer: Trainer, reporter: Reporter | _NoReporter) -> None:
    """Print what is trained, on which data and devices."""
    for line in describe_mixture(run.config, trainer.segment.order):
        reporter.say(line)
    parameters = trainer.state.root.trained_parameters().items()
    reporter.text("model", model_summary(parameters, run.config.model))


def _report_save(reporter: Reporter | _NoReporter, mirror: NoMirror, report: SaveReport) -> None:
    """Report a completed save, and have the checkpoint copied to the mirror."""
    reporter.saved()
    mirror.submit(report.path)
    for line in (*report.messages, *mirror.take_messages()):
        reporter.say(line)
