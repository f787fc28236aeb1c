"""The trainer's step as rank 0 of 64: the host never waits; the expected collectives."""

from __future__ import annotations

import pytest

from jepa_dist.optim.exchange import MAX_WAVES
from tests.without_gpu import environment, run
from tests.without_gpu.waits import KNOWN_WAITS, NO_WAITS

pytestmark = [pytest.mark.cuda_build, pytest.mark.timeout(1800)]

_JEPA = ("jepa.lambda=0.005", "jepa.start_frac=0")
_HSDP = ("parallel.dp_replicate=8", "parallel.dp_shard=8")


@pytest.fixture(scope="module", autouse=True)
def _needs_environment() -> None:
    try:
        environment.find()
    except environment.UnavailableError as error:
        pytest.skip(str(error))


def test_waits_are_noticed() -> None:
    found = run.try_waits()
    assert found["waits"].keys() == KNOWN_WAITS.keys()
    assert all(len(waits) == 1 for waits in found["waits"].values()), found["waits"]
    assert found["no waits"] == {name: [] for name in NO_WAITS}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("gpt_36m", ("--set", *_JEPA), id="36m"),
        pytest.param("gpt_36m", ("--looped", "--set", *_JEPA, *_HSDP), id="36m-looped-hsdp"),
        pytest.param("gpt_1b", (), id="1b"),
        pytest.param("gpt_1b", ("--set", *_HSDP), id="1b-hsdp"),
    ],
)
def test_step_waits_for_nothing_and_communicates_as_counted(
    config: str, options: tuple[str, ...]
) -> None:
    seen = run.watch_step(f"configs/{config}.yaml", "--ranks", 64, *options)
    assert seen["waits"] == []
    launches, expected = seen["launches"], seen["expected"]
    # Owners balance cost, not number: one of them may have a matrix more than the formula's share.
    assert expected.pop("all_to_all") <= launches.pop("all_to_all") <= 2 * MAX_WAVES
    assert launches == expected
