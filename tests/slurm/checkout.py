"""Checkouts to submit jobs from, and what the jobs write there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster, Job
from tests.support.tiny import REPOSITORY, tiny_overrides, write_corpus
from tests.support.train_command import json_lines

# A busy machine takes several times longer than an idle one.
PATIENCE = 400.0
# On PYTHONPATH it lets each step of a run sleep.
PACE = Path(__file__).parent / "pace"


class Checkout:
    """A copy of the repository (links, except for folders that are written) and a small corpus."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder / "a checkout"  # with a space, as folders of users have
        self.cluster = cluster
        self.script = self.folder / "slurm/jepa_8node.sh"
        self.folder.mkdir()
        for name in ("launch", "slurm"):
            shutil.copytree(REPOSITORY / name, self.folder / name)
        (self.folder / "slurm/site.env").unlink(missing_ok=True)
        for name in ("configs", "jepa_dist"):
            (self.folder / name).symlink_to(REPOSITORY / name)
        self.corpus = folder / "corpus"
        write_corpus(self.corpus, train_tokens=20_000)

    def settings(self, **changes: Any) -> list[str]:
        """Return CONFIG KEY=VALUE ... of the tiny recipe, by default without run.dir."""
        config = self.corpus / "tiny.yaml"
        config.touch()
        overrides = tiny_overrides(self.corpus, **changes)
        kept = [o for o in overrides if "run__dir" in changes or not o.startswith("run.dir=")]
        return [str(config), *kept]

    def submit(
        self,
        *settings: Any,
        options: tuple[str, ...] = (),
        cwd: Path | None = None,
        **environ: Any,
    ) -> Job:
        """``sbatch OPTIONS slurm/jepa_8node.sh SETTINGS`` from the checkout."""
        environ = {"VENV": sys.prefix, **environ}
        script = "slurm/jepa_8node.sh" if cwd is None else self.script
        return self.cluster.sbatch(
            *options, script, *settings, cwd=cwd or self.folder, environ=environ
        )

    def run_dir(self, job: Job, name: str = "tiny") -> Path:
        """Return the run directory of a job that was given no run.dir."""
        return self.folder / "runs" / f"{name}-{job.id}"


def world_sizes(run_dir: Path) -> list[int]:
    """Return the number of ranks of each start of the run."""
    return [start["world_size"] for start in json_lines(run_dir / "starts.jsonl")]
