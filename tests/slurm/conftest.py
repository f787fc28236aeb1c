"""One virtual cluster for all tests of this folder, and checkouts to submit from."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, Job, missing_programs
from tests.tiny import REPOSITORY, tiny_overrides, write_corpus

# A busy machine takes several times longer than an idle one.
PATIENCE = 400.0


@pytest.fixture(scope="session", autouse=True)
def slurm_is_installed() -> None:
    """Skip all tests of this folder, with a reason, if SLURM is not installed."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed (apt-get install slurm-wlm munge)")


@pytest.fixture(scope="session")
def cluster(
    slurm_is_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Eight nodes; all are up and idle before every test."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=8) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_queue(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the jobs of a failed test, so that the next one has the nodes."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


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


@pytest.fixture
def checkout(tmp_path: Path, cluster: Cluster) -> Checkout:
    return Checkout(tmp_path, cluster)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON Lines file; [] if it does not exist yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(run_dir: Path) -> int:
    """Return the last recorded step; 0 before the first."""
    records = json_lines(run_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def world_sizes(run_dir: Path) -> list[int]:
    """Return the number of ranks of each start of the run."""
    return [start["world_size"] for start in json_lines(run_dir / "starts.jsonl")]
