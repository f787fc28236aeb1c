"""The objectives by the name that ``jepa.objective`` gives them."""

from __future__ import annotations

from jepa_dist.config import Config
from jepa_dist.objectives.next_latent import NextLatentObjective
from jepa_dist.objectives.next_state import NextStateObjective
from jepa_dist.objectives.objective import NoObjective, Objective
from jepa_dist.objectives.span import SpanObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "span": SpanObjective,
    "next_state": NextStateObjective,
    "next_latent": NextLatentObjective,
}


def objective_class(config: Config) -> type[Objective]:
    """Return the class of the run's objective: ``NoObjective`` if ``jepa.lambda`` is 0."""
    return OBJECTIVES[config.jepa.objective] if config.jepa.lambda_ > 0 else NoObjective
