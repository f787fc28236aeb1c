"""The root module of training: GPT and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from jepa_dist.config import ModelConfig
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.objective import PREFIX, Objective, Sums

Watch = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class ObjectiveInput(NamedTuple):
    """The objective's inputs of a micro-batch besides the states."""

    weight_B: Tensor
    """float32 weight of each row (0 for padding)."""
    samples: Tensor | None
    """int64 [B, ...], these rows of rank 0's samples."""
    watch: Watch | None
    """Called with the states; returns the same ones for the objective to read."""


class JointOutput(NamedTuple):
    """The result of a pass (a pytree, as FSDP2's hooks need)."""

    loss_sum: Tensor | None = None
    """As in ``model.gpt.Output``."""
    row_loss_B: Tensor | None = None
    """As in ``model.gpt.Output``."""
    logits_BTV: Tensor | None = None
    """As in ``model.gpt.Output``."""
    objective: Sums | None = None
    """The objective's sums, if its input was given."""


class JointModel(nn.Module):
    """A GPT and its objective as one module, which FSDP shards as one.

    Once it is sharded, call this root, not its ``model``: FSDP2 gathers the parameters outside of
    blocks in the root's forward.
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
        """Run one pass over the model, and over the objective if its input is given.

        Args:
            tokens_BT: As ``GPT.forward``.
            targets_BT: As ``GPT.forward``.
            weight: As ``GPT.forward``.
            phase: As ``GPT.forward``.
            objective: Input of the objective; None: not computed.
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
        output_layer = (
            self.model.output_layer().detached() if self.objective.reads_output_layer else None
        )
        sums: Sums = self.objective(
            tuple(states), tokens_BT, given.weight_B, given.samples, output_layer
        )
        return sums
