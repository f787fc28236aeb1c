"""The training loop: what one step does fits on one screen, all else is called by name."""

from __future__ import annotations

import itertools
import math
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from jepa_dist.build import (
    build_document_starts,
    build_ema,
    build_loader,
    build_model,
    build_optimizer,
    build_validation,
)
from jepa_dist.checkpoint import Checkpointer, find_resumable, load, set_aside_after
from jepa_dist.checkpoint.manifest import STATE
from jepa_dist.config import Config
from jepa_dist.data.baseline import MAX_VOCAB, MOST_TARGETS, MOST_TOKENS, ngram_baseline
from jepa_dist.data.check import known_bos, load_checked_tokenizer
from jepa_dist.data.layout import BatchLayout
from jepa_dist.data.loader import Batch, make_batch
from jepa_dist.data.shards import find_shards
from jepa_dist.errors import TrainingError
from jepa_dist.evaluate.score import InterruptedEvaluationError
from jepa_dist.garbage import ScheduledCollection
from jepa_dist.generate import generate
from jepa_dist.health import BadSteps, is_healthy
from jepa_dist.interop.safetensors_io import Weights, export_model
from jepa_dist.jepa.loss import JepaLoss
from jepa_dist.jepa.probe import TapProbe
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.monitor.clipped import ClippedShare
from jepa_dist.monitor.compiles import CompileCounter
from jepa_dist.monitor.meter import Meter, RollingDigest
from jepa_dist.monitor.profiler import StepProfiler
from jepa_dist.monitor.reporter import Reporter
from jepa_dist.monitor.startup import Startup
from jepa_dist.monitor.stragglers import RankTimes
from jepa_dist.optim.clip import GradientClip
from jepa_dist.optim.histograms import Distribution, distributions
from jepa_dist.optim.update_ratio import UpdateRatio
from jepa_dist.parallel.communication import time_communication, without_communication
from jepa_dist.parallel.reduce import MetricsReduction, StepReport
from jepa_dist.parallel.replicas import check_replicas
from jepa_dist.parallel.shard import compile_region
from jepa_dist.parallel.world import World
from jepa_dist.plan import PlanChannel, StepPlan, TrainingClock
from jepa_dist.progress import Progress, progress_of
from jepa_dist.records import compiled_graphs, kinds_of_work, losses, memory, mfu
from jepa_dist.signals import STOP_SIGNALS, StopRequest


class Trainer:
    """Everything a run needs, built from its configuration. Construct on every rank alike.

    Args:
        config: The run.
        world: The ranks.
        checkpointer: Where checkpoints go; None saves none.
        resume: The checkpoint to go on from, known to be whole and to fit the configuration.
        identity: What a checkpoint says of the run besides (configuration, data fingerprint).
        startup: Measures what this start costs.
        on_stop: Called when this process is asked to stop, by the thread that receives signals.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        checkpointer: Checkpointer | None = None,
        resume: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        startup: Startup | None = None,
        on_stop: Callable[[], None] | None = None,
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
        self.clip_gradients = GradientClip(self.model.parameters(), config.optim.grad_clip_norm)
        self.ema = build_ema(config, self.model)
        self.tokenizer = load_checked_tokenizer(config, ("train", "val"))
        self.bos_id = known_bos(config, self.tokenizer)
        self.probe = TapProbe(
            config.model.seq_len, config.jepa.max_span_frac, self.bos_id, world.device
        )
        self.validation = build_validation(config, world, self.layout.micro_size, self.tokenizer)
        self.clock = TrainingClock()
        self.meter = Meter(config.batch.sequences * config.model.seq_len, world.device)
        time_communication(self.model, lambda: self.meter.communication())
        self.rank_times = self._compare_ranks()
        self.update_ratio = UpdateRatio(self.optimizer.parameters())
        self.clipped = ClippedShare(config.optim.grad_clip_norm)
        self.histograms: dict[str, Distribution] = {}
        self.compiles = CompileCounter()
        self.stop_request = (
            None if checkpointer is None else StopRequest(config.checkpoint.grace_seconds, on_stop)
        )
        self.startup = startup or Startup()
        self.startup.done("build")
        self._begin_at(Progress() if resume is None else self.restore(resume))
        self.phases: Counter[int] = Counter()
        if config.parallel.dp_replicate > 1:
            check_replicas(self.tensors(), world)
        self.startup.done("restore")

    def _compare_ranks(self) -> RankTimes:
        """Have the head timed on every rank, unless ranks are not to be compared. Collective."""
        compare = self.config.monitor.straggler_ratio > 0
        hosts = self.world.gather(socket.gethostname()) if compare else []
        times = RankTimes(self.world.rank, hosts, self.world.device)
        self.model.register_module("head", times.around(self.model.head))
        return times

    def _begin_at(self, progress: Progress) -> None:
        """Everything that follows from how far the run is."""
        self.progress = progress
        self.bad_steps = BadSteps(progress)
        self.batches = build_loader(
            self.config, self.world, progress.samples_consumed, progress.skip
        )
        documents = build_document_starts(
            self.config,
            self.world,
            self.bos_id,
            step=progress.step,
            consumed=progress.samples_consumed,
            skip=progress.skip,
        )
        self.plans = PlanChannel(self.config, self.world, self.clock, progress.phase, documents)
        self.reduction = MetricsReduction(self.world)
        self.latest: StepReport | None = None
        self.tokens_digest = RollingDigest(progress.tokens_digest)
        self.spans_digest = RollingDigest(progress.spans_digest)

    def run(
        self, reporter: Reporter | None, profiler: StepProfiler | None = None
    ) -> dict[str, Any]:
        """Train until the last step, or until a stop is asked for. Collective.

        Args:
            reporter: Publishes the records; on rank 0 only.
            profiler: Is told of every step.

        Returns:
            The last record, with totals, how it ended (``finished``, ``saved``, ``reason``), and
            (on rank 0) the baselines.

        Raises:
            TrainingError: on every rank: the loss does not stay finite.
        """
        garbage = ScheduledCollection(self.config.train.gc_every)
        try:
            baselines = self._baselines(reporter) | self._tokenizer_note(reporter)
            if self._is_complete():
                return self._conclude() | baselines
            if self.config.parallel.compile and self.config.parallel.compile_warmup:
                if reporter is not None:
                    reporter.say("compiling (a minute or so, seconds once the cache is filled)")
                if not self.warm_up():
                    return self._ended_before_training()
            self.clock.start(self.progress.seconds)
            self.meter.start()
            self.plans.request(self.progress.step)
            while True:
                plan = self.plans.take()
                if profiler is not None:  # while no plan travels: see StepProfiler.step
                    profiler.step()
                if plan.is_followed:
                    self.plans.request(plan.step + 1, settle=self._save_has_ended())
                self.step(plan)
                self._take_in(self.reduction.arrived())
                if plan.step == self.progress.step:
                    self.startup.done("first_step")
                validation = self.evaluate(plan) if plan.evaluate else {}
                self.compiles.observe(compiled_graphs(), kinds_of_work(plan))
                garbage.after_step(plan.step, compiled_graphs())
                if plan.settle and self.checkpointer is not None:
                    self.checkpointer.wait()
                record = self._record(plan) | validation if plan.log else None
                if reporter is not None:
                    reporter.step(record)
                    if self.histograms:
                        reporter.histograms(self.histograms, plan.step + 1)
                # After the record: a start that goes on from this checkpoint does not write it.
                if plan.save and self.checkpointer is not None:
                    self.save(self._progress_after(plan), wait=plan.stop)
                if plan.roll_back:
                    self.roll_back(reporter)
                if plan.stop:
                    assert record is not None
                    self._refuse_bad_end(plan, validation)
                    return record | self._ending(plan, plan.step + 1, validation) | baselines
        finally:
            garbage.close()
            self.batches.close()

    def step(self, plan: StepPlan) -> None:
        """One optimiser step: accumulate the gradient of the global batch, clip, update.

        A step whose loss or gradient is not finite updates nothing, on any rank; the host learns
        of it when the step's report arrives.
        """
        self.meter.step(plan.step, saving=self._is_saving(), times_communication=plan.log)
        self.phases[plan.phase] += 1
        self.optimizer.set_schedule(plan.lr_multiplier, plan.muon_momentum)
        if plan.spans is not None:
            self.spans_digest.update(plan.spans.astype("<i8").tobytes())
        sums: dict[str, Tensor] = {}
        probed: dict[str, Tensor] = {}
        digest = 0
        for index in range(self.layout.num_micro):
            with self.meter.phase("data_wait"):
                batch = next(self.batches)
            digest += batch.digest
            self.gathering.begin_micro_batch(is_last=index == self.layout.num_micro - 1)
            with self.meter.phase("forward"):
                loss, parts = self.loss(batch.to(self.world.device, non_blocking=True), plan, index)
            with self.meter.phase("backward"):
                _nan_unless_finite(loss).backward()
                probed |= self.probe.measure()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
        self.gathering.release()
        with self.meter.phase("optimizer"):
            grad_norm = self.clip_gradients()
            self.histograms = self._histograms(plan)
            if plan.log:
                self.update_ratio.before()
            self.optimizer.step(skip=(~grad_norm.isfinite()).float())
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update()
        self.reduction.submit(
            plan.step,
            sums | probed | self.update_ratio.after(),
            host_sums=self._stop_signals() | self.rank_times.host_sums(),
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
        tap_BTD = output.tap_BTD
        if plan.probe and index == 0:
            tap_BTD = self.probe.watch(tap_BTD, batch.tokens, len(self.layout.micro_rows(0)))
        jepa_sum, floored = self._jepa_loss_fn(tap_BTD, batch, plan, index)
        jepa = jepa_sum / max(1, plan.num_span_rows)
        return ce + plan.jepa_weight * jepa, {"ce": ce, "jepa": jepa, "floored": floored}

    def _jepa_loss_fn(
        self, tap_BTD: Tensor, batch: Batch, plan: StepPlan, index: int
    ) -> tuple[Tensor, Tensor]:
        """The JEPA region on this micro-batch's spans; rows without any do not count."""
        assert plan.spans is not None
        rows = self.layout.micro_rows(index)
        spans_BS2 = torch.zeros(len(batch.weight), *plan.spans.shape[1:], dtype=torch.int64)
        spans_BS2[: len(rows)] = torch.from_numpy(plan.spans[rows.start : rows.stop])
        if tap_BTD.is_cuda:
            spans_BS2 = spans_BS2.pin_memory()
        spans_BS2 = spans_BS2.to(tap_BTD.device, non_blocking=True)
        weight_B = batch.weight * (spans_BS2[:, 0, 0] > 0)
        return self.jepa_loss(tap_BTD, spans_BS2.clamp(min=1), weight_B)

    def evaluate(self, plan: StepPlan) -> dict[str, Any]:
        """Validate, at the end of the run also the EMA, and write a sample. Collective.

        Returns nothing when a stop was asked for meanwhile.
        """
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the steps still in flight are not evaluation
        with self.meter.phase("evaluation"), self.clock.paused():
            try:
                result = self._validate(plan.phase)
                if plan.last and self.ema is not None:
                    with self.ema.swap():
                        averaged = self._validate(plan.phase)
                    result |= {key.replace("val/", "val/ema_"): v for key, v in averaged.items()}
            except InterruptedEvaluationError:
                self.plans.request_stop("asked to stop during evaluation")
                return {}
            return result | self._validation_set() | self._sample(plan.phase)

    def _take_in(self, reports: list[StepReport]) -> None:
        """Account for the steps whose numbers have arrived."""
        for report in reports:
            self.latest = report
            self.tokens_digest.update(report.digest.to_bytes(8, "little"))
            self.bad_steps.observe(report, self._first_sample(report.step))
            self.clipped.observe(report.values["grad_norm"])
            self.rank_times.observe(report.values)
            signals = [n.name for n in STOP_SIGNALS if report.values[_signal_key(n)] > 0]
            if signals:
                self.plans.request_stop(f"asked to stop ({', '.join(signals)})")
        if self.bad_steps.in_row >= self.config.train.max_bad_steps:
            self.plans.request_roll_back()

    def _stop_signals(self) -> dict[str, float]:
        """Which signal this rank has been sent, to be added up over ranks."""
        received = None if self.stop_request is None else self.stop_request.received
        return {_signal_key(number): float(number == received) for number in STOP_SIGNALS}

    def _is_stop_asked(self) -> bool:
        """Whether any rank was asked to stop. Collective: waits for all."""
        self.meter.still_alive()
        request = self.stop_request
        return self.world.any(request is not None and request.received is not None)

    # ------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The whole state in tensors (live ones), by kind and name."""
        parameters = {f"model/{name}": p for name, p in self.model.named_parameters()}
        averages = {} if self.ema is None else self.ema.state_tensors()
        return parameters | self.optimizer.state_tensors() | averages

    def save(self, progress: Progress, *, wait: bool) -> None:
        """Start a checkpoint; ``wait`` until it is published. Collective."""
        assert self.checkpointer is not None
        healthy = self.latest is None or is_healthy(self.latest)
        state = {**asdict(progress), **self.identity, "healthy": healthy}
        with self.meter.phase("checkpoint"), self.clock.paused():
            self.checkpointer.save(progress.step, self.tensors(), state, wait=wait)

    def _progress_after(self, plan: StepPlan) -> Progress:
        """How far the run is once ``plan`` is done; waits for the device."""
        self._take_in(self.reduction.drain())
        return replace(
            self.progress,
            step=plan.step + 1,
            samples_consumed=self.batches.samples_consumed,
            phase=plan.phase,
            seconds=self.clock.seconds(),
            tokens_digest=self.tokens_digest.hex(),
            spans_digest=self.spans_digest.hex(),
            bad_steps=self.bad_steps.total,
            bad_in_row=self.bad_steps.in_row,
            bad_row_sample=self.bad_steps.row_sample,
        )

    def roll_back(self, reporter: Reporter | None) -> None:
        """Go back to the last healthy checkpoint and pass over the data that came with the bad
        steps; once in a run. Collective.

        The state is saved again at once, so that a restart passes over them, too.

        Raises:
            TrainingError: on every rank: it has been done before, or there is nothing to go to.
        """
        self._take_in(self.reduction.drain())
        window = range(self.bad_steps.row_sample, self.batches.samples_consumed)
        told = f"loss or gradient was not finite for {self.bad_steps.in_row} steps in a row"
        if self.checkpointer is None or self.progress.skip_count:
            raise TrainingError(*_advice(told, window, "it was rolled back once already"))
        self.checkpointer.wait()
        folder = self.checkpointer.folder
        found = find_resumable(folder, self.world, only_healthy=True)
        if found.path is None:
            raise TrainingError(*_advice(told, window, "there is no healthy checkpoint"))
        restored = self.restore(found.path)
        self.world.decide(lambda: set_aside_after(folder, restored.step))
        self.batches.close()
        self.bad_steps.end_row()
        self._begin_at(
            replace(
                restored,
                skip_start=window.start,
                skip_count=len(window),
                bad_steps=self.bad_steps.total,
                bad_in_row=0,
            )
        )
        self.save(self.progress, wait=True)
        if reporter is not None:
            reporter.go_back(
                self.progress.step,
                f"{told}: going back to step {restored.step}; samples {window.start} to "
                f"{window.stop - 1} of the order will be passed over",
            )
        self.clock.start(restored.seconds)
        self.plans.request(restored.step)

    def _first_sample(self, step: int) -> int:
        """Samples that the run has consumed before a step of this start."""
        steps = step - self.progress.step
        return self.progress.samples_consumed + steps * self.config.batch.sequences

    def _is_saving(self) -> bool:
        return self.checkpointer is not None and self.checkpointer.in_flight

    def _save_has_ended(self) -> bool:
        """Whether there is the end of a save to take note of."""
        return self.checkpointer is not None and self.checkpointer.has_landed

    def restore(self, checkpoint: Path) -> Progress:
        """Fill all tensors from a checkpoint. Collective.

        Raises:
            UserError: on every rank, if its tensors are not this run's.
        """
        state = load(checkpoint, self.tensors(), self.world, verified=True)
        return progress_of(checkpoint / STATE, state)

    # ---------------------------------------------------------------- beginning and end

    def _is_complete(self) -> bool:
        """Whether there is no step left: an earlier start was ended before it could conclude."""
        train = self.config.train
        limit = train.max_wallclock_seconds
        return self.progress.step >= train.steps or (
            limit is not None and self.progress.seconds >= limit
        )

    def _conclude(self) -> dict[str, Any]:
        """What follows the last step: validation and the closing record."""
        plan = replace(StepPlan.of_nothing(self.progress.phase, 0.0, None), last=True)
        validation = self.evaluate(plan)
        self._refuse_bad_end(plan, validation)
        return {
            "step": self.progress.step,
            "phase": self.progress.phase,
            **validation,
            **self._digests(),
            **self._ending(plan, self.progress.step, validation),
        }

    def _ending(self, plan: StepPlan, step: int, validation: Mapping[str, Any]) -> dict[str, Any]:
        """How training ended, and its totals; a last validation cut short is still to be done."""
        finished = plan.last and bool(validation)
        return self.meter.summary() | {
            "finished": finished,
            "saved": self.checkpointer is not None,
            "reason": self._why_finished(step) if finished else self.plans.stop_reason,
        }

    def _refuse_bad_end(self, plan: StepPlan, validation: Mapping[str, Any]) -> None:
        """Do not let a run count as finished that ended in numbers that are not finite.

        Raises:
            TrainingError: on every rank: its last steps were skipped, or its validation loss (live
                or averaged) is not finite.
        """
        if not plan.last:
            return
        advice = (
            "nothing was exported (python -m jepa_dist.checkpoint export RUN OUT --not-finite does "
            "so all the same); go on from an earlier checkpoint in another run.dir "
            "(checkpoint.resume=PATH) with lower learning rates (optim.*_lr)"
        )
        in_row = self.bad_steps.in_row
        if in_row > 0:
            raise TrainingError(
                f"the last {in_row} step(s) of the run were skipped, because loss or gradient was "
                "not finite: the run is not finished",
                advice,
            )
        bad = [key for key in ("val/loss", "val/ema_loss") if not _is_finite(validation.get(key))]
        if bad:
            raise TrainingError(f"{', '.join(bad)}: not finite at the end of the run", advice)

    def _why_finished(self, step: int) -> str:
        if step < self.config.train.steps:
            return "the time is used up (train.max_wallclock_seconds)"
        return "all steps are done"

    def _ended_before_training(self) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "finished": False,
            "saved": self.progress.step > 0,
            "reason": "asked to stop before the first step",
        }

    def _checkpoint_costs(self) -> dict[str, float]:
        """What the saves cost that ended since the last record; raises if one failed."""
        if self.checkpointer is None:
            return {}
        reports = self.checkpointer.poll()
        if not reports:
            return {}
        first = [report.stall_seconds for report in reports if report.is_first]
        later = [report.stall_seconds for report in reports if not report.is_first]
        return {
            **({"checkpoint/first_stall_seconds": first[0]} if first else {}),
            **({"checkpoint/stall_seconds": max(later)} if later else {}),
            "checkpoint/background_seconds": max(report.background_seconds for report in reports),
            "checkpoint/bytes": float(reports[-1].bytes),
        }

    def _validate(self, phase: int) -> dict[str, float | None]:
        """One validation; parameters are shards again afterwards, as EMA and updates need."""
        try:
            return self.validation.run(self.model, phase, self._is_stop_asked)
        finally:
            self.gathering.release()

    def _validation_set(self) -> dict[str, str]:
        """What was validated on, so that readers do not take two sets for one curve."""
        fingerprint = self.identity.get("validation_fingerprint")
        return {} if fingerprint is None else {"val/set": fingerprint}

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

    def warm_up(self) -> bool:
        """Compile every graph that the run will need; False if a stop was asked for. Collective.

        Where ranks of a host can share the compiler's cache, one of them fills it while the others
        wait. Weights, optimiser, data position and generators are not touched.
        """
        fills_cache = self.world.fills_compile_cache()
        for is_first_turn in (True, False):
            for phase, weight in itertools.product(*_variants(self.config)):
                if self._is_stop_asked():  # where the others wait
                    return False
                if is_first_turn == fills_cache:
                    self._compile(phase, weight)
        self.compiles.observe(compiled_graphs(), {"train", "jepa", "evaluate"})
        self.startup.done("warm_up")
        return True

    def _compile(self, phase: int, jepa_weight: float) -> None:
        """Forward and backward on a batch of zeros, and once without gradient as validation does;
        on this rank alone."""
        size, config = self.layout.micro_size, self.config
        rows = np.zeros((size, config.model.seq_len + 1), dtype=np.int64)
        batch = make_batch(rows, range(size), size).to(self.world.device)
        spans = np.ones((config.batch.sequences, config.jepa.spans_per_sequence, 2), dtype=np.int64)
        plan = StepPlan.of_nothing(phase, jepa_weight, spans if jepa_weight else None)
        self.gathering.begin_micro_batch(is_last=True)
        with without_communication(self.model):
            self.loss(batch, plan, index=0)[0].backward()
            self.gathering.release()
            self.optimizer.zero_grad()
            with torch.no_grad():
                self.model(batch.tokens, batch.targets, batch.weight, phase=phase)
            self.gathering.release()

    def _baselines(self, reporter: Reporter | None) -> dict[str, Any]:
        """Compute and print the n-gram baselines, on samples of large data; rank 0 only."""
        vocab_size, seq_len = self.config.model.vocab_size, self.config.model.seq_len
        if reporter is None or vocab_size > MAX_VOCAB or self.tokenizer is None:
            return {}
        train = find_shards(self.config.data.train, "data.train")
        windows = self.validation.windows(max(1, MOST_TARGETS // seq_len))
        baseline = ngram_baseline(train, windows, vocab_size, self.tokenizer.byte_counter())
        assert baseline is not None
        bits, of = baseline.bits_per_byte, self.validation.num_sequences
        samples = ""
        if baseline.available > MOST_TOKENS or len(windows) < of:
            samples = (
                f" (counted on {baseline.counted:,} of {baseline.available:,} training tokens, "
                f"scored on {len(windows):,} of {of:,} validation sequences)"
            )
        reporter.say(
            f"n-gram baselines: bigram {bits['bigram']:.4f}, trigram {bits['trigram']:.4f} bits "
            f"per byte{samples}"
        )
        return {f"baseline/{name}_bpb": value for name, value in bits.items()}

    def _tokenizer_note(self, reporter: Reporter | None) -> dict[str, str]:
        """Say, in the log and in the summary, what of a text the tokenizer loses."""
        note = None if self.tokenizer is None else self.tokenizer.note
        if reporter is None or note is None:
            return {}
        reporter.say(note)
        return {"tokenizer_note": note}

    def _record(self, plan: StepPlan) -> dict[str, Any]:
        """Everything that is known of a logged step; waits for the device."""
        self._take_in(self.reduction.drain())
        assert self.latest is not None
        values, speed = self.latest.values, self.meter.lap()
        phases, self.phases = self.phases, Counter()
        return {
            "step": plan.step + 1,
            "tokens": self._samples_after(plan) * self.config.model.seq_len,
            **losses(plan, values, self.config),
            **(self.probe.metrics(values) if plan.probe else {}),
            "grad_norm": values["grad_norm"],
            **self.clipped.record(),
            **self.update_ratio.metrics(values),
            "progress": plan.frac,
            "phase": plan.phase,
            **{f"lr/{name}": lr for name, lr in self.optimizer.learning_rates().items()},
            **speed,
            **mfu(speed["tokens_per_second"], phases, self.config, self.world),
            **memory(self.world.device),
            **self.rank_times.record(),
            "compile/graphs": compiled_graphs(),
            "compile/recompiles": self.compiles.recompiles,
            "bad_steps": self.bad_steps.total,
            **self._checkpoint_costs(),
            **self.startup.record(),
            "train_seconds": self.clock.seconds(),
            **self._digests(),
        }

    def _samples_after(self, plan: StepPlan) -> int:
        """Sequences trained on once ``plan`` is done."""
        steps = plan.step + 1 - self.progress.step
        return self.progress.samples_consumed + steps * self.config.batch.sequences

    def _histograms(self, plan: StepPlan) -> dict[str, Distribution]:
        """Of parameters and (clipped) gradients, at the steps that they are asked for."""
        every = self.config.monitor.histogram_every
        if every == 0 or (plan.step + 1) % every:
            return {}
        return distributions(self.model.named_parameters())

    def _digests(self) -> dict[str, str]:
        return {
            "tokens_digest": self.tokens_digest.hex(),
            "spans_digest": self.spans_digest.hex(),
        }


def _nan_unless_finite(loss: Tensor) -> Tensor:
    """The loss; with gradients that are not finite either if it is not, so that all ranks see."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _is_finite(value: float | None) -> bool:
    """Whether a number, if there is one, is finite."""
    return value is None or math.isfinite(value)


def _signal_key(number: signal.Signals) -> str:
    return f"stop/{number.name}"


def _advice(told: str, window: range, why_not: str) -> tuple[str, ...]:
    """What the user is told when the run gives up."""
    return (
        f"{told}, and {why_not}",
        f"the data they came with: samples {window.start} to {window.stop - 1} of the run's order",
        "lower the learning rates (optim.*_lr) or optim.grad_clip_norm, look at the data, or go on "
        "from an earlier checkpoint in another run.dir (checkpoint.resume=PATH)",
    )


def _variants(config: Config) -> tuple[list[int], list[float]]:
    """Recurrence phases and JEPA weights (off, on) that the run will pass through."""
    first = [1] if config.train.loop_phase2_at > 0 else []
    phases = [0, *first, LAST_PHASE] if config.model.num_loops > 0 else [0]
    return phases, [0.0, config.jepa.lambda_] if config.jepa.lambda_ > 0 else [0.0]
