"""The root of everything that is trained: the GPT and the objective beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from jepa_dist.config import ModelConfig
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.objective import PREFIX, Objective, Sums

Watch = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class ObjectiveInput(NamedTuple):
    """What the objective reads of a micro-batch besides the states."""

    weight_B: Tensor
    """float32 weight of each row (0 for padding)."""
    samples: Tensor | None
    """int64 [B, ...], these rows of what rank 0 sampled."""
    watch: Watch | None
    """Is shown the states, and returns the same ones for the objective to read."""


class JointOutput(NamedTuple):
    """What a pass hands out (a pytree, as FSDP2's hooks need)."""

    loss_sum: Tensor | None = None
    """As ``model.gpt.Output``'s."""
    row_loss_B: Tensor | None = None
    """As ``model.gpt.Output``'s."""
    logits_BTV: Tensor | None = None
    """As ``model.gpt.Output``'s."""
    objective: Sums | None = None
    """The objective's sums, if it was asked for."""


class JointModel(nn.Module):
    """A GPT and its objective as one module, which FSDP shards as one.

    Pass through this root, not through its ``model``, once it is sharded: FSDP2 gathers the
    parameters that belong to no block in the root's forward.
    """

    def __init__(self, model: GPT, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def regions(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the parts that are compiled, each as one graph."""
        yield from self.model.regions()
        yield PREFIX, self.objective

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters: the model's under their own names, then ``objective.NAME``."""
        of_objective = self.objective.named_parameters(prefix=PREFIX)
        return dict(self.model.named_parameters()) | dict(of_objective)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        phase: int = 0,
        objective: ObjectiveInput | None = None,
    ) -> JointOutput:
        """One pass over the model, and over the objective if its input is given.

        Args:
            tokens_BT: As ``GPT.forward``.
            targets_BT: As ``GPT.forward``.
            weight: As ``GPT.forward``.
            phase: As ``GPT.forward``.
            objective: What the objective reads; None leaves it out.
        """
        taps = () if objective is None else self.objective.taps
        output = self.model(tokens_BT, targets_BT, weight, phase=phase, taps=taps)
        sums = None if objective is None else self._jepa_loss_fn(output.taps, tokens_BT, objective)
        return JointOutput(output.loss_sum, output.row_loss_B, output.logits_BTV, sums)

    def _jepa_loss_fn(
        self, states: Sequence[Tensor], tokens_BT: Tensor, given: ObjectiveInput
    ) -> Sums:
        """Run the objective on the tapped states."""
        if given.watch is not None:
            states = given.watch(states)
        sums: Sums = self.objective(tuple(states), tokens_BT, given.weight_B, given.samples)
        return sums
