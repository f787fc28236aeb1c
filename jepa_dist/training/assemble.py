"""Assemble a run from its parts; no other module does."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jepa_dist.build import (
    build_document_starts,
    build_ema,
    build_joint_model,
    build_loader,
    build_optimizer,
    build_validation,
)
from jepa_dist.checkpoint import Checkpointer
from jepa_dist.config import Config
from jepa_dist.data.check import known_bos, load_checked_tokenizer
from jepa_dist.data.layout import BatchLayout
from jepa_dist.evaluate.weights import find_initial
from jepa_dist.monitor.startup import Startup
from jepa_dist.monitor.step_timer import StepTimer
from jepa_dist.monitor.stragglers import RankTimes
from jepa_dist.optim.clip import GradientClip
from jepa_dist.parallel.communication import time_communication
from jepa_dist.parallel.reduce import MetricsReduction
from jepa_dist.parallel.replicas import check_replicas
from jepa_dist.parallel.world import World
from jepa_dist.plan import PlanChannel, TrainingClock
from jepa_dist.process.signals import StopRequest
from jepa_dist.run.progress import Progress
from jepa_dist.training.evaluation import Evaluation
from jepa_dist.training.global_loss import GlobalLoss
from jepa_dist.training.instruments import (
    Clipping,
    Compiles,
    Histograms,
    Instruments,
    Memory,
    Probe,
    Speed,
    StopRequests,
    Stragglers,
    UpdateRatios,
)
from jepa_dist.training.loop import Trainer
from jepa_dist.training.recovery import Recovery
from jepa_dist.training.saving import CheckpointSaving, Saving
from jepa_dist.training.segment import Ledger, Observer, Segment
from jepa_dist.training.state import TrainState
from jepa_dist.training.step import TrainStep
from jepa_dist.training.stopping import NoRequest, StopSignals
from jepa_dist.training.times import Times
from jepa_dist.training.warm_up import NoWarmUp, WarmUp


def build_trainer(
    config: Config,
    world: World,
    checkpointer: Checkpointer | None = None,
    resume: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    startup: Startup | None = None,
    on_stop: Callable[[], None] | None = None,
    on_give_up: Callable[[str], None] | None = None,
    meter: StepTimer | None = None,
) -> Trainer:
    """Build everything a run needs from its configuration. Collective.

    Args:
        config: The run.
        world: The ranks.
        checkpointer: Where checkpoints go; None saves none, and installs no signal handlers.
        resume: The checkpoint to resume from, verified, and matching the configuration.
        identity: What a checkpoint stores of the run besides (configuration, data fingerprint).
        startup: Measures what this start costs.
        on_stop: Called when this process is asked to stop, by the thread that receives signals.
        on_give_up: Called with the reason before an exit because of checkpoint.grace_seconds.
        meter: Measures the phases of steps instead of the default one.
    """
    identity = dict(identity or {})
    layout = BatchLayout(config.batch.sequences, config.batch.micro, world.rank, world.world_size)
    tokenizer = load_checked_tokenizer(config, ("train", "val"))
    bos_id = known_bos(config, tokenizer)
    state = _build_state(config, world, bos_id, is_new=resume is None)
    validation = build_validation(config, world, layout.micro_size, tokenizer)
    meter = meter or StepTimer(config.batch.sequences * config.model.seq_len, world.device)
    time_communication(state.root, lambda: meter.communication())
    times = Times(meter, TrainingClock(), startup or Startup())
    saving: Saving = (
        Saving() if checkpointer is None else CheckpointSaving(checkpointer, state, times, identity)
    )
    rank_times = _compare_ranks(config, state)
    request = (
        NoRequest()
        if checkpointer is None
        else StopRequest(config.checkpoint.grace_seconds, on_stop, on_give_up)
    )
    stops = StopSignals(request, world, meter)
    instruments = _build_instruments(config, state, bos_id, times, saving, stops, rank_times)
    loss = GlobalLoss(config, layout, state.root, instruments.probe)
    train_step = TrainStep(state, layout, loss, instruments, meter)
    warms_up = config.parallel.compile and config.parallel.compile_warmup
    open_segment = functools.partial(build_segment, config, world, bos_id, times.clock, instruments)
    times.startup.done("build")
    segment = open_segment(Progress() if resume is None else state.restore(resume))
    if config.parallel.dp_replicate > 1:
        check_replicas(state.tensors(), world)
    times.startup.done("restore")
    return Trainer(
        config,
        state,
        segment,
        times,
        train_step,
        instruments,
        evaluation=Evaluation(config, state, validation, tokenizer, times, stops, identity),
        saving=saving,
        recovery=Recovery(state, saving, times, open_segment),
        warm_up=WarmUp(config, train_step, stops, times) if warms_up else NoWarmUp(),
    )


def build_segment(
    config: Config,
    world: World,
    bos_id: int | None,
    clock: TrainingClock,
    observer: Observer,
    progress: Progress,
) -> Segment:
    """Build everything that depends on the progress of the run.

    Args:
        config: The run.
        world: The ranks.
        bos_id: Id that begins every document; None if it is not known.
        clock: Training time, which rank 0's plans may depend on.
        observer: Receives the report of every step.
        progress: How far the run is.
    """
    consumed, skip = progress.samples_consumed, progress.skip
    batches = build_loader(config, world, consumed, skip)
    documents = build_document_starts(
        config, world, bos_id, step=progress.step, consumed=consumed, skip=skip
    )
    return Segment(
        config,
        progress,
        batches,
        batches.order,
        PlanChannel(config, world, clock, progress.phase, documents),
        MetricsReduction(world),
        Ledger(progress),
        observer,
    )


def _build_state(config: Config, world: World, bos_id: int | None, *, is_new: bool) -> TrainState:
    values = None
    if is_new and config.train.init_from is not None:
        values = find_initial(Path(config.train.init_from).expanduser(), config).value
    root, schedule = build_joint_model(config, world, bos_id, values)
    parameters = root.trained_parameters()
    return TrainState(
        world,
        root,
        schedule,
        build_optimizer(config, parameters),
        GradientClip(parameters.values(), config.optim.grad_clip_norm),
        build_ema(config, parameters),
    )


def _compare_ranks(config: Config, state: TrainState) -> RankTimes:
    """Return the timer that compares the ranks; none if comparison is disabled. Collective."""
    world, model = state.world, state.model
    compare = config.monitor.straggler_ratio > 0
    hosts = world.gather(socket.gethostname()) if compare else []
    times = RankTimes(world.rank, hosts, world.device)
    model.register_module("head", times.around(model.head))
    return times


def _build_instruments(
    config: Config,
    state: TrainState,
    bos_id: int | None,
    times: Times,
    saving: Saving,
    stops: StopSignals,
    rank_times: RankTimes,
) -> Instruments:
    world = state.world
    probe = Probe(state.objective.probe(bos_id, world.device))
    histograms = Histograms(state.root.trained_parameters(), config.monitor.histogram_every)
    compiles = Compiles()
    return Instruments(
        probe,
        histograms,
        compiles,
        everything=(
            Speed(times.meter, saving, state.root, world),
            StopRequests(stops),
            probe,
            Clipping(config.optim.grad_clip_norm),
            histograms,
            UpdateRatios(state.optimizer.parameters()),
            Stragglers(rank_times),
            Memory(world.device),
            compiles,
        ),
    )
