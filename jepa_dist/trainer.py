"""The training loop: what one step does fits on one screen, all else is called by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from jepa_dist.build import (
    build_ema,
    build_loader,
    build_model,
    build_optimizer,
    build_validation,
)
from jepa_dist.checkpoint import Checkpointer, load
from jepa_dist.config import Config
from jepa_dist.data.baseline import MAX_VOCAB, ngram_bits_per_byte
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch, make_batch
from jepa_dist.data.shards import find_shards
from jepa_dist.generate import generate
from jepa_dist.interop.safetensors_io import Weights, export_model
from jepa_dist.jepa.loss import UNSTRUCTURED_LOSS, JepaLoss
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.monitor.compiles import CompileCounter
from jepa_dist.monitor.hardware import peak_flops, resident_gib
from jepa_dist.monitor.meter import Meter, TokensDigest
from jepa_dist.monitor.reporter import Reporter
from jepa_dist.optim.clip import clip_grad_norm
from jepa_dist.parallel.reduce import MetricsReduction, StepReport
from jepa_dist.parallel.shard import compile_region
from jepa_dist.parallel.world import World
from jepa_dist.plan import PlanChannel, StepPlan, TrainingClock
from jepa_dist.signals import StopRequest


@dataclass(frozen=True)
class Progress:
    """How far a run is, besides its tensors (contract C5); nothing in it depends on the ranks."""

    step: int = 0
    """Optimiser steps done."""
    samples_consumed: int = 0
    phase: int = 0
    """Recurrence phase of the last step."""
    seconds: float = 0.0
    """Training time spent, over all starts of the run."""
    tokens_digest: str = ""


class Trainer:
    """Everything a run needs, built from its configuration. Construct on every rank alike.

    Args:
        config: The run.
        world: The ranks.
        checkpointer: Where checkpoints go; None saves none.
        resume: The checkpoint to go on from, known to be whole and to fit the configuration.
        identity: What a checkpoint says of the run besides (configuration, data fingerprint).
    """

    def __init__(
        self,
        config: Config,
        world: World,
        checkpointer: Checkpointer | None = None,
        resume: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.checkpointer = checkpointer
        self.identity = dict(identity or {})
        self.layout = BatchLayout(
            config.batch.sequences, config.batch.micro, world.rank, world.world_size
        )
        self.model, self.gathering = build_model(config, world)
        self.jepa_loss = JepaLoss(config.jepa.norm_floor)
        if config.parallel.compile:
            compile_region(self.jepa_loss)
        self.optimizer = build_optimizer(config, self.model)
        self.ema = build_ema(config, self.model)
        self.progress = Progress() if resume is None else self.restore(resume)
        self.batches = build_loader(config, world, self.progress.samples_consumed)
        self.tokenizer = load_checked_tokenizer(config, ("train", "val"))
        self.validation = build_validation(config, world, self.layout.micro_size, self.tokenizer)
        self.clock = TrainingClock()
        self.plans = PlanChannel(config, world, self.clock, self.progress.phase)
        self.reduction = MetricsReduction(world)
        self.meter = Meter(config.batch.sequences * config.model.seq_len)
        self.digest = TokensDigest(self.progress.tokens_digest)
        self.stop_request = StopRequest() if checkpointer is not None else None
        self.compiles = CompileCounter()
        self.latest: StepReport | None = None

    def run(self, reporter: Reporter | None) -> dict[str, Any]:
        """Train until the last step, or until a stop is asked for. Collective.

        Args:
            reporter: Publishes the records; on rank 0 only.

        Returns:
            The last record, with totals, ``finished``, and (on rank 0) the baselines.
        """
        try:
            baselines = self._baselines(reporter)
            if self.config.parallel.compile_warmup:
                self.warm_up()
            self.clock.start(self.progress.seconds)
            self.meter.start()
            self.plans.request(self.progress.step)
            while True:
                plan = self.plans.take()
                if not plan.stop:
                    self.plans.request(plan.step + 1)
                self.step(plan)
                self._take_in(self.reduction.arrived())
                validation = self.evaluate(plan) if plan.evaluate else {}
                self.compiles.observe(_compiled_graphs(), _kinds_of_work(plan))
                record = self._record(plan) | validation if plan.log else None
                if plan.save:
                    self.save(plan)
                if reporter is not None:
                    reporter.step(record)
                if plan.stop:
                    assert record is not None
                    totals = self.meter.summary() | {"finished": plan.last}
                    return record | totals | baselines
        finally:
            self.batches.close()

    def step(self, plan: StepPlan) -> None:
        """One optimiser step: accumulate the gradient of the global batch, clip, update."""
        self.meter.step()
        self.optimizer.set_schedule(plan.lr_multiplier, plan.muon_momentum)
        sums: dict[str, Tensor] = {}
        digest = 0
        for index in range(self.layout.num_micro):
            with self.meter.waiting_for_data():
                batch = next(self.batches)
            digest += batch.digest
            self.gathering.begin_micro_batch(is_last=index == self.layout.num_micro - 1)
            loss, parts = self.loss(batch.to(self.world.device, non_blocking=True), plan, index)
            loss.backward()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
        self.gathering.release()
        grad_norm = clip_grad_norm(self.model.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()
        asked = self.stop_request is not None and self.stop_request.received is not None
        self.reduction.submit(
            plan.step,
            sums,
            host_sums={"stop_requests": float(asked)},
            digest=digest % 2**64,
            shared={"grad_norm": grad_norm},
        )

    def loss(self, batch: Batch, plan: StepPlan, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss of the global batch, and its parts as sums over rows.

        Sums over ranks and micro-batches of what is returned are the global numbers, however the
        batch is divided (contract C1).
        """
        sequences, targets = self.config.batch.sequences, batch.targets
        tap = None if plan.spans is None else self.config.jepa.layer
        output = self.model(batch.tokens, targets, batch.weight, phase=plan.phase, tap=tap)
        ce = output.loss_sum / (sequences * targets.size(1))
        if plan.spans is None:
            zero = torch.zeros_like(ce)
            return ce, {"ce": ce, "jepa": zero, "floored": zero}
        jepa_sum, floored = self._jepa_loss_fn(output.tap_BTD, batch, plan, index)
        jepa = jepa_sum / sequences
        return ce + plan.jepa_weight * jepa, {"ce": ce, "jepa": jepa, "floored": floored}

    def _jepa_loss_fn(
        self, tap_BTD: Tensor, batch: Batch, plan: StepPlan, index: int
    ) -> tuple[Tensor, Tensor]:
        """The JEPA region on this micro-batch's spans (padding rows get a legal one)."""
        assert plan.spans is not None
        rows = self.layout.micro_rows(index)
        spans_BS2 = torch.ones(len(batch.weight), *plan.spans.shape[1:], dtype=torch.int64)
        spans_BS2[: len(rows)] = torch.from_numpy(plan.spans[rows.start : rows.stop])
        if tap_BTD.is_cuda:
            spans_BS2 = spans_BS2.pin_memory()
        spans_BS2 = spans_BS2.to(tap_BTD.device, non_blocking=True)
        return self.jepa_loss(tap_BTD, spans_BS2, batch.weight)

    def evaluate(self, plan: StepPlan) -> dict[str, Any]:
        """Validate, at the end of the run also the EMA, and write a sample. Collective."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the steps still in flight are not evaluation
        with self.meter.evaluating(), self.clock.paused():
            result = self._validate(plan.phase)
            if plan.last and self.ema is not None:
                with self.ema.swap():
                    averaged = self._validate(plan.phase)
                result |= {key.replace("val/", "val/ema_"): v for key, v in averaged.items()}
            return result | self._sample(plan.phase)

    def _take_in(self, reports: list[StepReport]) -> None:
        """Account for the steps whose numbers have arrived."""
        for report in reports:
            self.latest = report
            self.digest.update(report.digest)
            if report.values["stop_requests"] > 0:
                self.plans.request_stop()

    # ------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The whole state in tensors (live ones), by kind and name."""
        parameters = {f"model/{name}": p for name, p in self.model.named_parameters()}
        averages = {} if self.ema is None else self.ema.state_tensors()
        return parameters | self.optimizer.state_tensors() | averages

    def save(self, plan: StepPlan) -> None:
        """Start a checkpoint; wait for it if it is the last thing to do. Collective."""
        if self.checkpointer is None:
            return
        self._take_in(self.reduction.drain())
        assert self.latest is not None
        progress = Progress(
            step=plan.step + 1,
            samples_consumed=self.batches.samples_consumed,
            phase=plan.phase,
            seconds=self.clock.seconds(),
            tokens_digest=self.digest.hex(),
        )
        healthy = all(math.isfinite(value) for value in self.latest.values.values())
        state = {**asdict(progress), **self.identity, "healthy": healthy}
        with self.meter.evaluating(), self.clock.paused():
            self.checkpointer.save(progress.step, self.tensors(), state, wait=plan.stop)

    def restore(self, checkpoint: Path) -> Progress:
        """Fill all tensors from a checkpoint. Collective.

        Raises:
            UserError: on every rank, if its tensors are not this run's.
        """
        state = load(checkpoint, self.tensors(), self.world, verified=True)
        return Progress(**{name: state[name] for name in asdict(Progress())})

    def _checkpoint_costs(self) -> dict[str, float]:
        """What the saves cost that ended since the last record; raises if one failed."""
        if self.checkpointer is None:
            return {}
        reports = self.checkpointer.poll()
        if not reports:
            return {}
        return {
            "checkpoint/stall_seconds": max(report.stall_seconds for report in reports),
            "checkpoint/background_seconds": max(report.background_seconds for report in reports),
            "checkpoint/bytes": float(reports[-1].bytes),
        }

    def _validate(self, phase: int) -> dict[str, float | None]:
        """One validation; parameters are shards again afterwards, as EMA and updates need."""
        result = self.validation.run(self.model, phase)
        self.gathering.release()
        return result

    def _sample(self, phase: int) -> dict[str, str]:
        """A text sample, if there is a tokenizer to write it with."""
        if self.tokenizer is None or self.config.eval.sample_tokens == 0:
            return {}
        text = generate(
            self.model,
            self.tokenizer,
            self.config.eval.prompt,
            num_tokens=self.config.eval.sample_tokens,
            temperature=1.0,
            seed=self.config.seed,
            phase=phase,
            device=self.world.device,
        )
        self.gathering.release()
        return {"sample": text}

    def export(self, folder: Path, summary: dict[str, Any]) -> None:
        """Write the trained model, and its EMA if there is one, as safetensors. Collective."""

        def export(weights: Weights) -> None:
            step, phase = summary["step"], summary["phase"]
            export_model(
                folder, self.model, self.config, step, self.world, phase=phase, weights=weights
            )

        export("live")
        if self.ema is not None:
            with self.ema.swap():
                export("ema")

    def warm_up(self) -> None:
        """Compile every graph that the run will need. Collective.

        Forward and backward on a batch of zeros, in every phase, with and without the objective,
        and once without gradient as validation does: weights, optimiser, data position and
        generators are not touched.
        """
        size, config = self.layout.micro_size, self.config
        rows = np.zeros((size, config.model.seq_len + 1), dtype=np.int64)
        batch = make_batch(rows, range(size), size).to(self.world.device)
        spans = np.ones((config.batch.sequences, config.jepa.spans_per_sequence, 2), dtype=np.int64)
        for phase, weight in itertools.product(*_variants(config)):
            plan = StepPlan.of_nothing(phase, weight, spans if weight else None)
            self.gathering.begin_micro_batch(is_last=True)
            self.loss(batch, plan, index=0)[0].backward()
            self.gathering.release()
            self.optimizer.zero_grad()
            with torch.no_grad():
                self.model(batch.tokens, batch.targets, batch.weight, phase=phase)
            self.gathering.release()
        self.compiles.observe(_compiled_graphs(), {"train", "jepa", "evaluate"})

    def _baselines(self, reporter: Reporter | None) -> dict[str, float]:
        """Bits per byte that counting reaches, told at once; on rank 0 alone."""
        vocab_size = self.config.model.vocab_size
        if reporter is None or vocab_size > MAX_VOCAB or self.tokenizer is None:
            return {}
        train = find_shards(self.config.data.train, "data.train")
        counted = ngram_bits_per_byte(
            train, self.validation.windows(), vocab_size, self.tokenizer.byte_counter()
        )
        assert counted is not None
        reporter.say(
            f"to beat, by counting: bigram {counted['bigram']:.4f}, "
            f"trigram {counted['trigram']:.4f} bits per byte"
        )
        return {f"baseline/{name}_bpb": value for name, value in counted.items()}

    def _record(self, plan: StepPlan) -> dict[str, Any]:
        """Everything that is known of a logged step; waits for the device."""
        self._take_in(self.reduction.drain())
        assert self.latest is not None
        values, speed = self.latest.values, self.meter.lap()
        return {
            "step": plan.step + 1,
            **_losses(plan, values, self.config),
            "grad_norm": values["grad_norm"],
            "progress": plan.frac,
            "phase": plan.phase,
            **{f"lr/{name}": lr for name, lr in self.optimizer.learning_rates().items()},
            **speed,
            **_mfu(speed["tokens_per_second"], plan.phase, self.config, self.world),
            **_memory(self.world.device),
            "compile/graphs": _compiled_graphs(),
            "compile/recompiles": self.compiles.recompiles,
            **self._checkpoint_costs(),
            "tokens_digest": self.digest.hex(),
        }


def _variants(config: Config) -> tuple[list[int], list[float]]:
    """Recurrence phases and JEPA weights (off, on) that the run will pass through."""
    first = [1] if config.train.loop_phase2_at > 0 else []
    phases = [0, *first, LAST_PHASE] if config.model.num_loops > 0 else [0]
    return phases, [0.0, config.jepa.lambda_] if config.jepa.lambda_ > 0 else [0.0]


def _losses(plan: StepPlan, values: dict[str, float], config: Config) -> dict[str, float | None]:
    """Means over the global batch of this step; JEPA's are None while it is off."""
    ce, jepa = values["ce"], values["jepa"]
    if plan.spans is None:
        return {"loss/ce": ce, "loss/jepa": None, "loss/total": ce, "jepa/lambda": 0.0}
    num_spans = config.batch.sequences * config.jepa.spans_per_sequence
    return {
        "loss/ce": ce,
        "loss/jepa": jepa,
        "loss/total": ce + plan.jepa_weight * jepa,
        "jepa/lambda": plan.jepa_weight,
        "jepa/cos": 1.0 - jepa,
        "jepa/relative": jepa / UNSTRUCTURED_LOSS,
        "jepa/floored": values["floored"] / num_spans,
    }


def _kinds_of_work(plan: StepPlan) -> set[str]:
    kinds = {"train"}
    if plan.spans is not None:
        kinds.add("jepa")
    if plan.evaluate:
        kinds.add("evaluate")
    return kinds


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _mfu(tokens_per_second: float, phase: int, config: Config, world: World) -> dict[str, float]:
    """Share of the devices' peak; nothing where the peak is not known."""
    if world.device.type != "cuda":
        return {}
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    if peak is None:
        return {}
    flops = tokens_per_second * training_flops_per_token(config.model, phase)
    return {"mfu": flops / (peak * world.world_size)}


def _memory(device: torch.device) -> dict[str, float]:
    """Of this rank, in GiB."""
    memory = {"memory/resident_gib": resident_gib()}
    if device.type == "cuda":
        memory["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory
