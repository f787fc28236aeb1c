"""One virtual cluster for all tests of this folder, and checkouts to submit from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.checkout import Checkout
from tests.slurm.cluster import Cluster, missing_programs


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


@pytest.fixture
def checkout(tmp_path: Path, cluster: Cluster) -> Checkout:
    return Checkout(tmp_path, cluster)
