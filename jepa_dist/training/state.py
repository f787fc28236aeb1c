"""What lives as long as the process: everything that is trained, and what trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from jepa_dist.checkpoint import load
from jepa_dist.checkpoint.manifest import STATE
from jepa_dist.config import Config
from jepa_dist.interop.safetensors_io import Weights, export_model
from jepa_dist.jepa.loss import JepaLoss
from jepa_dist.model.gpt import GPT
from jepa_dist.optim.clip import GradientClip
from jepa_dist.optim.ema import EMA
from jepa_dist.optim.optimizer import Optimizer
from jepa_dist.parallel.shard import Gathering
from jepa_dist.parallel.world import World
from jepa_dist.progress import Progress, progress_of


@dataclass(frozen=True)
class TrainState:
    """This rank's part of everything that is trained. Its tensors change, its members do not."""

    world: World
    model: GPT
    schedule: Gathering
    """When parameters are gathered and gradients reduced."""
    objective: JepaLoss
    optimizer: Optimizer
    clip_gradients: GradientClip
    ema: EMA

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state in tensors (live ones), by kind and name."""
        parameters = {f"model/{name}": p for name, p in self.model.named_parameters()}
        return parameters | self.optimizer.state_tensors() | self.ema.state_tensors()

    def restore(self, checkpoint: Path) -> Progress:
        """Fill all tensors from a checkpoint and return how far its run was. Collective.

        Raises:
            UserError: on every rank, if its tensors are not this run's.
        """
        state = load(checkpoint, self.tensors(), self.world, verified=True)
        return progress_of(checkpoint / STATE, state)

    def export(self, folder: Path, config: Config, step: int, phase: int) -> None:
        """Write the model, and its EMA if there is one, as safetensors. Collective.

        Args:
            folder: Where to.
            config: The run's.
            step: Optimizer steps done.
            phase: Recurrence phase of the last step.
        """

        def export(weights: Weights) -> None:
            export_model(folder, self.model, config, step, self.world, phase=phase, weights=weights)

        export("live")
        if self.ema.is_on:
            with self.ema.swap():
                export("ema")
