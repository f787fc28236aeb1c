"""Everything that rank 0 publishes: console, metrics.jsonl, TensorBoard and status.json."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_dist.config import Config, flatten, to_dict, to_yaml
from jepa_dist.monitor.alarms import JepaAlarms
from jepa_dist.monitor.console import Console
from jepa_dist.monitor.environment import as_lines, environment
from jepa_dist.monitor.history import RunHistory
from jepa_dist.monitor.run_dir import RunStatus, read_status
from jepa_dist.monitor.stragglers import StragglerAlarm
from jepa_dist.monitor.system import SystemReader
from jepa_dist.monitor.writer import MetricsWriter
from jepa_dist.optim.histograms import Distribution

# Prefixes of the keys that are columns of TensorBoard's HParams table.
_SWEPT = ("seed", "jepa.", "optim.", "batch.sequences", "train.steps")


class Reporter:
    """Publisher of a run's records, on rank 0.

    Args:
        run_dir: The run directory.
        config: The run's configuration.
        done: Steps completed before this start.
        world_size: Number of ranks.
        train_seconds: Training time spent before this start.
        facts: What its numbers depend on besides the configuration (``records.facts``).
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        done: int = 0,
        world_size: int = 1,
        *,
        train_seconds: float = 0.0,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        surroundings = environment(world_size)
        self._history = RunHistory(
            run_dir,
            done,
            world_size,
            read_status(run_dir).get("state"),
            train_seconds=train_seconds,
            config=to_dict(config),
            facts=facts,
            environment=surroundings,
        )
        self._save_seconds: float | None = None
        self._system = SystemReader(run_dir)
        self._environment = as_lines({**surroundings, **(facts or {})})
        self._open(done)
        self._status = RunStatus(run_dir, self._warn)
        self._status.update(state="running", step=done, reason="")

    def _open(self, done: int) -> None:
        self._done = self._recorded = done
        self._console = Console(self._config.train.steps, done)
        self._writer = MetricsWriter(self._run_dir, done, self._warn)
        self._writer.text("config", to_yaml(self._config))
        self._writer.text("environment", self._environment)
        monitor = self._config.monitor
        self._alarms = JepaAlarms(monitor.dead_gradient_ratio, monitor.collapse_share)
        self._alarms.recall(self._run_dir / "metrics.jsonl")
        self._stragglers = StragglerAlarm(monitor.straggler_ratio)

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self._console.say(text)

    def text(self, tag: str, text: str) -> None:
        """Add a text to TensorBoard."""
        self._writer.text(tag, text, self._done)

    def histograms(self, values: Mapping[str, Distribution], step: int) -> None:
        """Add histograms to TensorBoard, by tag."""
        self._writer.histograms(values, step)

    def step(self, record: Mapping[str, Any] | None) -> None:
        """Report a completed step; ``record`` is None unless it is logged."""
        self._console.step()
        if record is not None:
            self._recorded = record["step"]
            for key in ("checkpoint/first_stall_seconds", "checkpoint/stall_seconds"):
                self._save_seconds = record.get(key, self._save_seconds)
            goodput = self._history.record(record["train_seconds"], self._save_seconds)
            if "startup/total" in record:
                self._console.say(_startup_line(record))
            self._console.record(record)
            self._writer.write({**record, **goodput, **self._system.record()})
            self._status.update(
                step=record["step"],
                phase=record["phase"],
                tokens_per_second=record["tokens_per_second"],
            )
            for alarm in [*self._alarms.observe(record), *self._stragglers.observe(record)]:
                self._warn(alarm)
                self._writer.text("alarms", alarm, record["step"])

    def go_back(self, step: int, why: str) -> None:
        """Continue from an earlier step: drop the records of later steps."""
        self._writer.close()
        self._console.close()
        self._open(step)
        self._warn(why)
        self._status.update(step=step)

    def saved(self) -> None:
        """Report that a checkpoint was published."""
        self._status.update()

    def diverged(self, reason: str) -> None:
        """Record that the run has diverged, and why; sweeps read this record."""
        self._writer.diverged(self._recorded, reason)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Update ``status.json``, print how the run ended, and close; for a finished run, also
        write the closing record.

        (After a failure nothing needs closing: every record is written immediately.)
        """
        is_finished = summary["finished"]
        if is_finished:
            self._writer.summary(summary, self._settings())
        self._writer.close()
        self._console.close()
        for line in _closing_lines(summary, self._run_dir) if is_finished else [_stopped(summary)]:
            self._console.say(line)
        state = "finished" if is_finished else "stopped"
        self._status.update(state=state, step=summary["step"], reason=summary["reason"])

    def _warn(self, text: str) -> None:
        self._console.say(f"warning: {text}")

    def _settings(self) -> dict[str, Any]:
        """Return the run's HParams columns; TensorBoard accepts numbers, strings and booleans."""
        return {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in flatten(to_dict(self._config))
            if key.startswith(_SWEPT)
        }


def _startup_line(record: Mapping[str, Any]) -> str:
    parts = ", ".join(
        f"{key.removeprefix('startup/').replace('_', ' ')} {value:.1f}"
        for key, value in record.items()
        if key.startswith("startup/") and key != "startup/total"
    )
    return f"first step {record['startup/total']:.1f} s after the process started: {parts}"


def _stopped(summary: Mapping[str, Any]) -> str:
    how = "with a checkpoint" if summary["saved"] else "without a checkpoint"
    return (
        f"stopped after step {summary['step']} {how}: {summary['reason']}; "
        "the same command resumes the run"
    )


def _closing_lines(summary: Mapping[str, Any], run_dir: Path) -> list[str]:
    speed, bpb = summary["tokens_per_second"], summary["val/bpb"]
    lines = [
        f"done: {summary['step']} steps"
        + (f" in {summary['seconds']:.0f} s, median {speed:,.0f} tokens/s" if speed else ""),
        f"validation loss {summary['val/loss']:.4f} nats per token"
        + (f", {bpb:.4f} bits per byte" if bpb is not None else ""),
    ]
    if "baseline/bigram_bpb" in summary:
        lines.append(
            f"n-gram baselines on the same training text: "
            f"bigram {summary['baseline/bigram_bpb']:.4f}, "
            f"trigram {summary['baseline/trigram_bpb']:.4f} bits per byte"
        )
    return [
        *lines,
        f"run directory: {run_dir}",
        f"watch it: {_tensorboard_command(run_dir.parent)}",
    ]


def _tensorboard_command(folder: Path) -> str:
    """Return the command that shows all runs in ``folder``; works from any directory."""
    program = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard") == str(program)
    return shlex.join(
        ["tensorboard" if on_path else str(program), "--logdir", str(folder.resolve())]
    )
