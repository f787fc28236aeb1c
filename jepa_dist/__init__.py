"""Distributed training of GPT language models with a JEPA objective."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from jepa_dist.command_line import refuse_module_without_command

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from jepa_dist.inference.trained import TrainedModel

__version__ = "0.1.0"

# Without a log file, messages of ranks would go to standard error besides what is printed there.
logging.getLogger(__name__).addHandler(logging.NullHandler())
refuse_module_without_command()


def load(
    run: str | Path,
    step: int | None = None,
    ema: bool = False,
    device: str | torch.device | None = None,
) -> TrainedModel:
    """Load the model of a run, ready to use: docs/using.md.

    Args:
        run: Run directory, exported model, or one checkpoint; made by any number of ranks.
        step: Optimizer step of the weights; None takes the newest intact ones.
        ema: Take the moving average of the weights.
        device: Where to put the model; None takes the GPU if there is one.

    Raises:
        errors.UserError: no model there, none of this step, no moving average, or damaged files.
    """
    from jepa_dist.inference import trained  # imported here because importing torch is slow

    return trained.load(run, step, ema, device)
