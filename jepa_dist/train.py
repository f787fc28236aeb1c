"""Train a model: ``python -m jepa_dist.train CONFIG [KEY=VALUE ...]``, also under torchrun."""

from __future__ import annotations

import argparse
import uuid
from pathlib import Path
from typing import Any, NoReturn

from jepa_dist.config import Config, ParallelConfig, check_world, load, to_dict
from jepa_dist.data.check import check_data
from jepa_dist.data.shards import find_shards, fingerprint
from jepa_dist.errors import UserError
from jepa_dist.failure import told_by_this_rank, told_once
from jepa_dist.launched import (
    die_with_launcher,
    launched_local_world_size,
    launched_rank,
    launched_world_size,
    tell_place,
)
from jepa_dist.monitor.run_dir import check_run_dir
from jepa_dist.monitor.startup import Startup
from jepa_dist.process_env import set_defaults


def main() -> None:
    """Check everything that can be checked, then train."""
    die_with_launcher()
    set_defaults(launched_local_world_size())
    rank = launched_rank()
    with told_once(rank):
        arguments = parse_arguments()
        resolved = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if rank == 0:
                print(resolved.describe())
            return
        check_world(resolved.config, launched_world_size())
        check_data(resolved.config)
        if arguments.check:
            check_run_dir(Path(resolved.config.run.dir).expanduser())
            return
    tell_place()
    train(resolved.config, rank)


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as everything else does: one line, once."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help shows how to call it")


def parse_arguments() -> argparse.Namespace:
    """The command line; options may stand anywhere.

    Raises:
        UserError: not understood.
    """
    parser = _Parser(prog="python -m jepa_dist.train", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/debug.yaml")
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
        help="check configuration, data and run directory as a start would, then exit",
    )
    return parser.parse_intermixed_args()


def train(config: Config, rank: int) -> None:
    """Join the other ranks and run to the end, or until asked to stop."""
    startup = Startup()
    startup.done("check")
    # Imported late: mistakes in the configuration are told before torch takes its seconds.
    from jepa_dist.build import chosen_attention
    from jepa_dist.checkpoint import Checkpointer, Keep
    from jepa_dist.model.summary import model_summary
    from jepa_dist.monitor.memory import memory_watched
    from jepa_dist.monitor.peers import Peers
    from jepa_dist.monitor.profiler import StepProfiler
    from jepa_dist.monitor.reporter import Reporter
    from jepa_dist.monitor.run_dir import log_to_run_dir, note_failure
    from jepa_dist.monitor.watchdog import Watchdog
    from jepa_dist.parallel.world import record_collectives, start_world, stop_world
    from jepa_dist.resume import find_start, open_run_dir
    from jepa_dist.trainer import Trainer

    startup.done("imports")
    run_dir = Path(config.run.dir).expanduser()
    record_collectives(run_dir / "logs")
    with told_by_this_rank(rank):
        world = start_world(config.parallel)
    startup.done("process_group")
    with told_once(rank):
        attention = chosen_attention(config.model, config.parallel, world.device)
        data = world.decide(lambda: fingerprint_data(config))
        start = find_start(config, run_dir, data["train"]["digest"], world)
        if rank == 0:
            print(*start.messages, sep="\n", end="\n" * bool(start.messages))
        if not start.is_finished:
            world.decide(lambda: open_run_dir(run_dir, config, data))
            keep = Keep(config.checkpoint.keep_last, config.checkpoint.keep_every)
            checkpointer = Checkpointer(run_dir / "checkpoints", world, keep)
            peers = Peers(run_dir, rank, world.decide(lambda: uuid.uuid4().hex))
            if rank == 0:
                peers.remove_old_reports()
    startup.done("find_checkpoint")
    if not start.is_finished:

        def note(reason: str) -> None:
            peers.report_failure(reason)
            note_failure(run_dir, rank, reason)

        with (
            told_by_this_rank(rank, on_failure=note),
            memory_watched(run_dir, rank, snapshot=config.monitor.memory_snapshot),
        ):
            log_to_run_dir(run_dir, rank)
            identity = {"config": to_dict(config), "data_fingerprint": data["train"]["digest"]}
            reporter = None
            if rank == 0:
                choices = {"attention kernel": attention}
                reporter = Reporter(run_dir, config, start.step, world.world_size, choices)
                reporter.say(describe_kernels(config.parallel, attention))
            trainer = Trainer(
                config,
                world,
                checkpointer,
                start.checkpoint,
                identity,
                startup,
                on_stop=peers.leave_if_local_rank_ended,
            )
            if reporter is not None:
                parameters = trainer.model.named_parameters()
                reporter.text("model", model_summary(parameters, config.model))
            late = config.monitor.late_seconds
            with (
                Watchdog(
                    run_dir,
                    rank,
                    world.world_size,
                    lambda: trainer.meter.place,
                    late,
                    look=peers.leave_if_reported,
                ),
                StepProfiler(config.monitor.profile, run_dir, rank) as profiler,
            ):
                summary = trainer.run(reporter, profiler)
                checkpointer.close()
                if summary["finished"]:
                    trainer.export(run_dir, summary)
            if reporter is not None:
                reporter.finish(summary)
    stop_world()


def describe_kernels(config: ParallelConfig, attention: str) -> str:
    """Return a line that says which kernels this start runs."""
    line = f"attention kernel: {attention} (parallel.attention={config.attention})"
    if not config.deterministic:
        return line
    from jepa_dist.parallel.determinism import EXCLUDED

    return f"{line}; deterministic algorithms only, without {EXCLUDED}"


def fingerprint_data(config: Config) -> dict[str, Any]:
    """What the shards are, by split."""
    return {
        split: fingerprint(find_shards(pattern, f"data.{split}"))
        for split, pattern in (("train", config.data.train), ("val", config.data.val))
    }


if __name__ == "__main__":
    main()
