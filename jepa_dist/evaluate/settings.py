"""Settings of a run that apply when its trained model is used, and their overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jepa_dist.config import Config, as_override, check_world, flatten, load, to_dict
from jepa_dist.errors import UserError
from jepa_dist.process.dist_env import launched_world_size


@dataclass(frozen=True)
class Relevant:
    """The settings that apply to one use of a trained model.

    All others concern training. The mesh is not the run's, since the number of ranks may differ.
    """

    purpose: str
    """Name of the use with its article, for messages."""
    changeable: tuple[str, ...]
    """Keys, or prefixes that end in a dot, that the command line may set; their default is the
    run's value. Of ``parallel.`` only compilation and precision are taken from the run."""

    def resolve(self, trained: Config, overrides: Sequence[str]) -> Config:
        """Return the configuration: the run's values of these keys, with ``overrides``.

        Raises:
            UserError: an override that is unknown, of the wrong type, or without effect here, a
                mesh that does not fit the ranks, or a data URL that only the model names.
        """
        shown = [f"{key}*" if key.endswith(".") else key for key in self.changeable]
        idle = [
            f"command line: {item}: has no effect on {self.purpose}; keys that have are "
            f"{', '.join(shown[:-1])} and {shown[-1]}"
            for item in overrides
            if "=" in item and not item.strip().startswith(self.changeable)
        ]
        if idle:
            raise UserError(*idle)
        of_run = tuple(key for key in self.changeable if key != "parallel.")
        taken = [
            as_override(key, value)
            for key, value in flatten(to_dict(trained))
            if key.startswith((*_ALWAYS_TAKEN, *of_run))
        ]
        world_size = launched_world_size()
        given = {item.partition("=")[0].strip() for item in overrides}
        urls = [
            f"{key}={value!r:.300}: is a URL that the model's own configuration names; repeat it "
            "on the command line to allow reading it"
            for key, value in flatten(to_dict(trained))
            if key.startswith(of_run) and key not in given and "://" in repr(value)
        ]
        if urls:
            raise UserError(*urls)
        # There is no training batch that could be too small for the ranks.
        config = load(None, [*taken, f"batch.sequences={world_size}", *overrides], {}).config
        check_world(config, world_size)
        return config


_ALWAYS_TAKEN = ("model.", "parallel.compile", "parallel.precision")
EVALUATION = Relevant(
    "an evaluation", ("data.val", "data.tokenizer", "eval.sequences", "batch.micro", "parallel.")
)
CALIBRATION = Relevant(
    "a quantized artifact", ("data.train", "batch.micro", "quantization.", "parallel.")
)
QUANTIZED_EVALUATION = Relevant(
    "an evaluation after quantization",
    tuple(dict.fromkeys((*EVALUATION.changeable, *CALIBRATION.changeable))),
)
