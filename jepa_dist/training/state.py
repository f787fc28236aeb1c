"""The training state, which lives as long as the process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from jepa_dist.checkpoint import load
from jepa_dist.checkpoint.manifest import STATE
from jepa_dist.config import Config
from jepa_dist.interop.safetensors_io import Weights, export_model
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.joint import JointModel
from jepa_dist.objectives.objective import PREFIX, Objective, is_objectives
from jepa_dist.optim.clip import GradientClip
from jepa_dist.optim.ema import EMA
from jepa_dist.optim.optimizer import Optimizer
from jepa_dist.parallel.shard import FSDPSchedule
from jepa_dist.parallel.world import World
from jepa_dist.run.progress import Progress, progress_of


@dataclass(frozen=True)
class TrainState:
    """This rank's part of everything that is trained. Its tensors change, its fields do not."""

    world: World
    root: JointModel
    """The model and the objective; passes go through it."""
    schedule: FSDPSchedule
    """When parameters are gathered and gradients reduced."""
    optimizer: Optimizer
    clip_gradients: GradientClip
    ema: EMA

    @property
    def model(self) -> GPT:
        """The model without the objective, as it is exported."""
        return self.root.model

    @property
    def objective(self) -> Objective:
        """The objective, which may have parameters."""
        return self.root.objective

    def tensors(self) -> dict[str, Tensor]:
        """Return all live tensors of the state, by kind and name."""
        parameters: dict[str, Tensor] = {}
        for kind, module in (("model", self.model), (PREFIX, self.objective)):
            parameters |= {f"{kind}/{name}": p for name, p in module.named_parameters()}
        return parameters | self.optimizer.state_tensors() | self.ema.state_tensors()

    def restore(self, checkpoint: Path) -> Progress:
        """Fill all tensors from a checkpoint and return how far its run was. Collective.

        The objective may have changed since: tensors of it that the checkpoint does not have keep
        their initial values.

        Raises:
            UserError: on every rank, if its tensors are not this run's.
        """
        tensors = self.tensors()
        state = load(checkpoint, tensors, self.world, verified=True, is_optional=is_objectives)
        return progress_of(checkpoint / STATE, state)

    def export(self, folder: Path, config: Config, step: int, phase: int) -> None:
        """Write the model, and its EMA if there is one, as safetensors. Collective.

        Args:
            folder: Folder to write into.
            config: Configuration of the run.
            step: Optimizer steps done.
            phase: Recurrence phase of the last step.
        """

        self.schedule.release()

        def export(weights: Weights) -> None:
            export_model(folder, self.model, config, step, self.world, phase=phase, weights=weights)

        export("live")
        if self.ema.is_on:
            with self.ema.swap():
                export("ema")
