"""Validation during training, and a text sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jepa_dist.config import Config
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.evaluate.score import InterruptedEvaluationError
from jepa_dist.evaluate.validation import Validation
from jepa_dist.generate import generate
from jepa_dist.plan import PlanChannel, StepPlan
from jepa_dist.training.state import TrainState
from jepa_dist.training.stopping import StopSignals
from jepa_dist.training.times import Times


class Evaluation:
    """Evaluation of the weights and, at the end of the run, of their moving average.

    Args:
        config: The run.
        state: What is evaluated.
        validation: On what.
        tokenizer: Encodes and decodes the text sample; None: no sample.
        times: An evaluation does not count as training time.
        stops: A request to stop ends an evaluation early.
        identity: As in ``saving``; its validation fingerprint goes into the record.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        validation: Validation,
        tokenizer: Tokenizer | None,
        times: Times,
        stops: StopSignals,
        identity: Mapping[str, Any],
    ) -> None:
        self.validation = validation
        self.tokenizer = tokenizer
        self._config = config
        self._state = state
        self._times = times
        self.stops = stops
        # Identifies the validation data, so that readers do not draw two sets as one curve.
        fingerprint = identity.get("validation_fingerprint")
        self._set = {} if fingerprint is None else {"val/set": fingerprint}

    def run(self, plan: StepPlan, plans: PlanChannel) -> dict[str, Any]:
        """Return the metrics of the evaluation that ``plan`` requests. Collective.

        Empty if the plan requests none, or if a stop was requested meanwhile, which is then put
        into the next plan.
        """
        if not plan.evaluate:
            return {}
        if self._state.world.device.type == "cuda":
            torch.cuda.synchronize()  # the steps still in flight are not evaluation
        with self._times.off_training("evaluation"):
            try:
                result = self._validate(plan.phase)
                if plan.last:
                    result |= self._validate_average(plan.phase)
            except InterruptedEvaluationError:
                plans.request_stop("asked to stop during evaluation")
                return {}
            return result | self._set | self._sample(plan.phase)

    def _validate(self, phase: int) -> dict[str, float | None]:
        """Validate once; parameters are shards again afterwards, as EMA and updates need."""
        try:
            return self.validation.run(self._state.root, phase, self.stops.is_asked)
        finally:
            self._state.schedule.release()

    def _validate_average(self, phase: int) -> dict[str, float | None]:
        if not self._state.ema.is_on:
            return {}
        with self._state.ema.swap():
            averaged = self._validate(phase)
        return {key.replace("val/", "val/ema_"): value for key, value in averaged.items()}

    def _sample(self, phase: int) -> dict[str, str]:
        """Return a text sample, if there is a tokenizer to write it with."""
        if self.tokenizer is None or self._config.eval.sample_tokens == 0:
            return {}
        text = generate(
            self._state.root,
            self.tokenizer,
            self._config.eval.prompt,
            num_tokens=self._config.eval.sample_tokens,
            temperature=1.0,
            seed=self._config.seed,
            phase=phase,
            device=self._state.world.device,
        )
        self._state.schedule.release()
        return {"sample": text}
