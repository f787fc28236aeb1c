"""The short form of the chaos suite: a handful of scenarios, always the same moments."""

from __future__ import annotations

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.harness import Session, play

# For busy or slow machines; costs time only if something fails.
PATIENCE = 3.0
# A moment of milliseconds may be missed, especially on a busy machine.
ATTEMPTS = 4
# Stop signals, kills of a rank (tests/test_elastic.py) and of one that saves
# (tests/test_checkpoint_crash.py), and other numbers of ranks have tests of their own.
CHOSEN = ("kill the agent", "flipped bit")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("chaos"), PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", CHOSEN)
def test_a_disturbed_run_ends_as_an_undisturbed_one(session: Session, scenario: str) -> None:
    for attempt in range(ATTEMPTS):
        number = attempt * len(CHOSEN) + CHOSEN.index(scenario)
        result = play(session, number, scenario, FAULTS[scenario], seed=f"short form {attempt}")
        if result.outcome != "missed":
            break
    assert result.outcome == "survived", f"{'; '.join(result.details)}: {result.problem}"
