"""Everything rank 0 publishes: console, metrics.jsonl and TensorBoard together."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_dist.config import Config, to_yaml
from jepa_dist.monitor.console import Console
from jepa_dist.monitor.run_dir import write_status
from jepa_dist.monitor.writer import MetricsWriter


class Reporter:
    """Publishes records. One per run, on rank 0."""

    def __init__(self, run_dir: Path, config: Config, done: int = 0) -> None:
        self._run_dir = run_dir
        self._console = Console(config.train.steps, done)
        self._writer = MetricsWriter(run_dir, done)
        self._writer.text("config", to_yaml(config))

    def say(self, text: str) -> None:
        """Tell the user something, on the console only."""
        self._console.say(text)

    def step(self, record: Mapping[str, Any] | None) -> None:
        """A step is done; ``record`` is None unless it is logged."""
        self._console.step()
        if record is not None:
            self._console.record(record)
            self._writer.write(record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Leave ``status.json``, tell how the run ended, and close; of a finished run also write
        the closing record.

        (After a failure nothing needs closing: every record is flushed as it is written.)
        """
        is_finished = summary["finished"]
        if is_finished:
            self._writer.summary(summary)
        self._writer.close()
        state = "finished" if is_finished else "stopped"
        write_status(self._run_dir, {"state": state, "step": summary["step"], "saved": True})
        self._console.close()
        for line in _closing_lines(summary, self._run_dir) if is_finished else [_stopped(summary)]:
            self._console.say(line)


def _stopped(summary: Mapping[str, Any]) -> str:
    return (
        f"stopped after step {summary['step']} with a checkpoint; "
        "the same command goes on from there"
    )


def _closing_lines(summary: Mapping[str, Any], run_dir: Path) -> list[str]:
    lines = [
        f"done: {summary['step']} steps in {summary['seconds']:.0f} s, "
        f"median {summary['tokens_per_second']:,.0f} tokens/s",
        f"validation loss {summary['val/loss']:.4f} nats per token, "
        f"{summary['val/bpb']:.4f} bits per byte",
    ]
    if "baseline/bigram_bpb" in summary:
        lines.append(
            f"for comparison, counted on the same training text: "
            f"bigram {summary['baseline/bigram_bpb']:.4f}, "
            f"trigram {summary['baseline/trigram_bpb']:.4f} bits per byte"
        )
    return [
        *lines,
        f"run directory: {run_dir}",
        f"watch it: {_tensorboard_command(run_dir.parent)}",
    ]


def _tensorboard_command(folder: Path) -> str:
    """What shows all runs in ``folder``, to be pasted in any directory."""
    program = Path(sys.executable).with_name("tensorboard")
    on_path = shutil.which("tensorboard") == str(program)
    return shlex.join(
        ["tensorboard" if on_path else str(program), "--logdir", str(folder.resolve())]
    )
