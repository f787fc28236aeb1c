"""Train a model: ``python -m jepa_dist.train CONFIG [KEY=VALUE ...]``, also under torchrun."""

from __future__ import annotations

import argparse
import functools
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_dist.command_line import Parser, program
from jepa_dist.config import Config, ParallelConfig, check_world, load, to_dict
from jepa_dist.data.check import check_data, with_bos
from jepa_dist.data.sources import describe_mixture, fingerprint_split
from jepa_dist.errors import TrainingError
from jepa_dist.monitor.run_dir import check_run_dir, record_failure
from jepa_dist.monitor.startup import Startup
from jepa_dist.process.dist_env import (
    adopt_launcher,
    die_with_launcher,
    launched_rank,
    launched_world_size,
    print_local_ranks,
    ranks_on_this_host,
)
from jepa_dist.process.failure import exit_on_host_error, exit_on_rank_error, exit_on_user_error
from jepa_dist.process.output import keep_output_alive
from jepa_dist.process.variables import set_defaults
from jepa_dist.remote import open_remote
from jepa_dist.run.consistency import Statement, statement
from jepa_dist.run.lock import RunLock
from jepa_dist.start.host import check_compiler_space, check_host

if TYPE_CHECKING:
    from jepa_dist.checkpoint import SaveReport
    from jepa_dist.checkpoint.mirror import NoMirror
    from jepa_dist.monitor.reporter import Reporter

# At the end of a run, the last upload may take this long.
_UPLOAD_SECONDS = 600.0


def main() -> None:
    """Check everything that can be checked, then train."""
    keep_output_alive()
    with exit_on_host_error():
        arguments = parse_arguments()
        adopt_launcher(os.environ, will_meet=not (arguments.print_config or arguments.check))
        die_with_launcher()
        set_defaults(ranks_on_this_host())
        resolved = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if launched_rank() == 0:
                print(resolved.describe())
            return
        config = resolved.config
        check_world(config, launched_world_size())
        check_data(config)
        config = with_bos(config)
        if config.parallel.compile:
            check_compiler_space()
        if config.checkpoint.mirror is not None:
            open_remote(config.checkpoint.mirror, "checkpoint.mirror")
        if arguments.check:
            check_run_dir(Path(config.run.dir).expanduser())
            return
        check_host(config)
        mine = statement(config, data := fingerprint_data(config))
    print_local_ranks()
    train(config, data, mine)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; options may appear anywhere.

    Raises:
        UserError: invalid arguments.
    """
    parser = Parser(prog=program("jepa_dist.train"), description=__doc__)
    parser.add_argument(
        "config", type=Path, help="YAML file, or the name of a shipped one, e.g. debug"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. jepa.lambda=0.02"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved values and where each came from, then exit",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run a start's checks of configuration, data and run directory, then exit",
    )
    return parser.parse_intermixed_args()


def train(config: Config, data: Mapping[str, Any], mine: Statement) -> None:
    """Create the process group and train until the run is finished or asked to stop.

    Args:
        config: The run's configuration.
        data: Fingerprints of the shards by split.
        mine: This rank's statement of what must be identical on all ranks.
    """
    startup = Startup()
    startup.done("check")
    # Imported here, so that configuration errors are printed before the slow import of torch.
    from jepa_dist.build import chosen_attention
    from jepa_dist.checkpoint import Checkpointer, RetentionPolicy
    from jepa_dist.checkpoint.agreement import on_every_rank
    from jepa_dist.checkpoint.mirror import open_mirror
    from jepa_dist.evaluate.weights import find_initial
    from jepa_dist.model.summary import model_summary
    from jepa_dist.monitor.device_memory import explain_out_of_memory
    from jepa_dist.monitor.peers import Peers
    from jepa_dist.monitor.profiler import StepProfiler
    from jepa_dist.monitor.reporter import Reporter
    from jepa_dist.monitor.run_dir import log_to_run_dir
    from jepa_dist.monitor.watchdog import Watchdog
    from jepa_dist.parallel.world import record_collectives, start_world, stop_world
    from jepa_dist.start.capacity import check_memory
    from jepa_dist.start.resume import find_start, open_run_dir
    from jepa_dist.training.assemble import build_trainer
    from jepa_dist.training.baselines import Baselines
    from jepa_dist.training.listeners import SILENT
    from jepa_dist.training.records import facts

    startup.done("imports")
    rank = launched_rank()
    run_dir = Path(config.run.dir).expanduser()
    record_collectives(run_dir / "logs")
    with exit_on_rank_error(rank):
        world = start_world(config.parallel, mine)
    startup.done("process_group")
    lock = RunLock(run_dir)
    validated_on = f"{data['val']['digest']}:{config.eval.sequences}"
    with exit_on_user_error(rank, on_failure=lock.release):
        attention = chosen_attention(config.model, config.parallel, world.device)
        on_every_rank(lambda: check_memory(config, world), world)
        messages = world.run_on_main(lock.acquire)
        start = find_start(config, run_dir, data["train"]["digest"], world, validated_on)
        config = start.resolve(config)
        if rank == 0:
            for line in (*messages, *start.messages):
                print(line)
        initial = config.train.init_from
        if initial is not None and start.checkpoint is None:
            on_every_rank(lambda: find_initial(Path(initial).expanduser(), config), world)
            if rank == 0:
                print(f"initial weights: {initial}")
        keep = RetentionPolicy(config.checkpoint.keep_last, config.checkpoint.keep_every)
        mirror = open_mirror(config.checkpoint.mirror if rank == 0 else None, keep)
        if start.checkpoint is not None and start.checkpoint.parent == run_dir / "checkpoints":
            mirror.submit(start.checkpoint)  # an earlier upload may have been cut off
        if not start.is_finished:
            world.run_on_main(lambda: open_run_dir(run_dir, config, data))
            checkpointer = Checkpointer(run_dir / "checkpoints", world, keep)
            peers = Peers(run_dir, rank, world.run_on_main(lambda: uuid.uuid4().hex))
            if rank == 0:
                peers.remove_old_reports()
    startup.done("find_checkpoint")
    if not start.is_finished:

        def note(reason: str) -> None:
            peers.report_failure(reason)
            try:
                record_failure(run_dir, rank, reason)
            finally:
                lock.release()

        with (
            exit_on_rank_error(rank, on_failure=note),
            explain_out_of_memory(run_dir, rank, snapshot=config.monitor.memory_snapshot),
        ):
            log_to_run_dir(run_dir, rank)
            identity = {
                "config": to_dict(config),
                "data_fingerprint": data["train"]["digest"],
                "validation_fingerprint": validated_on,
            }
            reporter = None
            if rank == 0:
                reporter = Reporter(
                    run_dir,
                    config,
                    start.step,
                    world.world_size,
                    train_seconds=start.seconds,
                    facts={**facts(config, world.device), "parallel.attention": attention},
                )
                reporter.say(describe_kernels(config.parallel, attention))
                checkpointer.on_published = functools.partial(_tell_saved, reporter, mirror)
            trainer = build_trainer(
                config,
                world,
                checkpointer,
                start.checkpoint,
                identity,
                startup,
                on_stop=peers.leave_if_local_rank_ended,
                on_give_up=note,
            )
            if reporter is not None:
                for line in describe_mixture(config, trainer.segment.order):
                    reporter.say(line)
                parameters = trainer.state.root.trained_parameters().items()
                reporter.text("model", model_summary(parameters, config.model))
            late = config.monitor.late_seconds
            with (
                Watchdog(
                    run_dir,
                    rank,
                    world.world_size,
                    lambda: trainer.times.meter.place,
                    late,
                    look=peers.leave_if_reported,
                ),
                StepProfiler(config.monitor.profile, run_dir, rank) as profiler,
            ):
                if reporter is not None:
                    evaluation = trainer.evaluation
                    baselines = Baselines(
                        config, evaluation.validation, evaluation.tokenizer, reporter.say
                    )
                try:
                    outcome = trainer.run(reporter or SILENT, profiler)
                except TrainingError as error:
                    if reporter is not None:
                        reporter.diverged(error.problems[0])
                    raise
                checkpointer.close()
                if outcome.finished:
                    trainer.export(run_dir, outcome)
            if reporter is not None:
                compared = baselines.values() if outcome.finished else {}
                reporter.finish(outcome.summary() | compared)
    stop_world()
    mirror.close(_UPLOAD_SECONDS)
    for line in mirror.take_messages():
        print(line)
    lock.release()


def _tell_saved(reporter: Reporter, mirror: NoMirror, report: SaveReport) -> None:
    """Tell what became of a save, and have the checkpoint copied; on rank 0."""
    reporter.saved()
    mirror.submit(report.path)
    for line in (*report.messages, *mirror.take_messages()):
        reporter.say(line)


def describe_kernels(config: ParallelConfig, attention: str) -> str:
    """Return one line that names the kernels of this start."""
    line = f"attention kernel: {attention} (parallel.attention={config.attention})"
    if not config.deterministic:
        return line
    from jepa_dist.parallel.determinism import EXCLUDED

    return f"{line}; deterministic algorithms only, without {EXCLUDED}"


def fingerprint_data(config: Config) -> dict[str, Any]:
    """Return the fingerprint of the shards, by split."""
    return {split: fingerprint_split(config, split) for split in ("train", "val")}


if __name__ == "__main__":
    main()
