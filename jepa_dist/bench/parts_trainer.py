"""Parts of ``bench gpu`` that train: a step taken apart, its floor, checkpoints, JEPA, HSDP."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch._dynamo
from torch.profiler import ProfilerActivity, profile

import jepa_dist
from jepa_dist.bench import jepa as jepa_bench
from jepa_dist.bench import step_floor as step_bench
from jepa_dist.bench.common import synchronize
from jepa_dist.bench.session import Measured, Session, Skipped, WarmTrainer
from jepa_dist.bench.training import steady
from jepa_dist.checkpoint import Checkpointer, RetentionPolicy
from jepa_dist.config import Config
from jepa_dist.model.flops import training_flops_per_token
from jepa_dist.parallel.world import World, build_mesh
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.training.assemble import build_trainer
from jepa_dist.training.records import compiled_graphs, mfu

_PACKAGE = str(Path(jepa_dist.__file__).parent)
_WAIT = "called a synchronizing CUDA operation"
_GIB = 2**30
_HSDP_STEPS = 4
# bfloat16 sums differ by their order.
_HSDP_TOLERANCE = 0.02

# ---------------------------------------------------------------------------- step


def step(session: Session, path: str) -> Measured:
    """Measure the trainer's steps: speed, phases, host time, waits, kernels, memory."""
    warm = session.warm(path)
    trainer, device = warm.trainer, session.device
    steps = 2 if session.small else 5
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.times.meter.start()
    host = [_host_seconds(warm.step, device) for _ in range(steps)]
    seconds = _queued_seconds(warm.step, device, steps)
    trainer.segment.reduction.drain()
    lap = trainer.times.meter.lap()
    config = trainer.config
    tokens = config.batch.sequences * config.model.seq_len
    phase = Planner(config, TrainingClock()).plan(0).phase
    waits = waits_for_device(warm.step, device)
    work = device_work(warm.step, session)
    phases = {name: 1e3 * value for name, value in lap.items() if name.startswith("time/")}
    passes = lap["time/forward"] + lap["time/backward"]
    figures = {
        "tokens/s": tokens / seconds,
        "step ms": 1e3 * seconds,
        "host ms": 1e3 * statistics.median(host),
        "optimizer ms": phases["time/optimizer"],
        "waits for the device": len(waits),
        "first step s": warm.first_step_seconds,
        **_shares("MFU of", tokens, {"step": seconds, "forward and backward": passes}, phase, warm),
        **_memory(device),
    }
    if device.type == "cuda":
        figures |= {
            "kernels per step": work["kernels"],
            "kernels ms": work["kernel_ms"],
            "launch queue full ms": work["queue_full_ms"],
        }
    details = {
        "tokens_per_step": tokens,
        "recurrence_phase": phase,
        "build_seconds": warm.build_seconds,
        "host_ms_of_each_step": [1e3 * value for value in host],
        "phases_ms": phases,
        "graphs": compiled_graphs(),
        "waits": waits,
        "work": work,
    }
    off = [f"a step waits for the device at {place}" for place in dict.fromkeys(waits)]
    notes = [
        "phases in ms: "
        + ", ".join(f"{n.removeprefix('time/')} {v:.3g}" for n, v in phases.items())
    ]
    return Measured(figures, details, off, notes)


def _host_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the time until a step is launched, starting with an idle device.

    Includes waits for CUDA's launch queue, if the host is far ahead.
    """
    synchronize(device)
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    synchronize(device)
    return seconds


def _queued_seconds(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Return the seconds per step of consecutive steps, synchronizing only at the end, as in
    training."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def _shares(
    name: str, tokens: int, seconds: dict[str, float], phase: int, warm: WarmTrainer
) -> dict[str, float]:
    """Return MFU in percent, if the device's peak is known."""
    config, world = warm.trainer.config, warm.trainer.state.world
    flops = tokens * training_flops_per_token(config.model, phase)
    found = {what: mfu(flops / took, world) for what, took in seconds.items()}
    return {f"{name} {what} %": 100 * m["mfu"] for what, m in found.items() if m}


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / _GIB,
        "reserved memory GiB": torch.cuda.memory_reserved(device) / _GIB,
    }


def waits_for_device(step: Callable[[], None], device: torch.device) -> list[str]:
    """Return where the host waits for the device in a step: innermost lines of this package."""
    found = []

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _WAIT in str(message):
            found.append(_innermost_line() or f"{filename}:{lineno}")

    is_cuda = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    return found


def _innermost_line() -> str | None:
    """Return file and line of the innermost frame in this package outside this module."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_PACKAGE) and frame.filename != __file__:
            return f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.lineno}"
    return None


def device_work(step: Callable[[], None], session: Session) -> dict[str, Any]:
    """Profile one step: kernels, their time, the longest by name, and a full launch queue."""
    cuda = [ProfilerActivity.CUDA] if session.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as recorded:
        step()
        synchronize(session.device)
    trace = session.folder / f"rank_{session.world.rank}" / "step.json.gz"
    recorded.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8", errors="replace") as file:
        return summarize_trace(json.load(file))


def summarize_trace(trace: dict[str, Any]) -> dict[str, Any]:
    """Return what a Chrome trace of torch.profiler says of the device, in milliseconds."""
    milliseconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    queue_full = 0.0
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            milliseconds[event["name"]] += event["dur"] / 1e3
            counts[event["name"]] += 1
        elif event.get("cat") == "overhead" and event["name"] == "Command Buffer Full":
            queue_full += event["dur"] / 1e3
    return {
        "kernels": counts.total(),
        "kernel_ms": milliseconds.total(),
        "queue_full_ms": queue_full,
        "longest": [
            {"name": name, "ms": ms, "count": counts[name]}
            for name, ms in milliseconds.most_common(30)
        ],
    }


# ---------------------------------------------------------------------------- floor


def floor(session: Session, path: str) -> Measured:
    """Compare the trainer's loop with a bare one in rounds, as ``bench step`` does.

    Raises:
        Skipped: both do not fit on the device at once.
    """
    rounds, steps = (1, 1) if session.small else (3, 4)
    config = steady(session.config(path), rounds + 1, steps)
    # The first step has compiled all graphs of these rounds.
    parallel = config.parallel.model_copy(update={"compile_warmup": False})
    config = config.model_copy(update={"parallel": parallel})
    try:
        result = step_bench.measure(config, session.world)
    except torch.cuda.OutOfMemoryError:
        if session.world.world_size > 1:
            raise
        raise Skipped("out of memory: trainer and floor do not fit together") from None
    if not result:  # not rank 0
        return Measured({})
    figures = {
        "trainer tokens/s": result["loops"]["trainer"]["tokens_per_second"],
        "floor tokens/s": result["loops"]["floor"]["tokens_per_second"],
        "trainer / floor, time ratio": result["ratio"],
    }
    return Measured(figures, result)


# ---------------------------------------------------------------------------- checkpoint


def checkpoint(session: Session, path: str) -> Measured:
    """Time two saves during training; the first also page-locks its host buffers."""
    warm, world = session.warm(path), session.world
    folder = session.folder / "checkpoints" / Path(path).stem
    saver = Checkpointer(folder, world, RetentionPolicy(last=1))
    saves = [_save(saver, number, warm, world) for number in (1, 2)]
    saver.close()
    first, second = saves
    figures = {
        "stall of the first save ms": first["stall_ms"],
        "stall of the second save ms": second["stall_ms"],
        "written in the background GB/s": second["gigabytes"] / second["background_s"],
        "step meanwhile ms": second["step_meanwhile_ms"],
    }
    return Measured(figures, {"saves": saves})


def _save(saver: Checkpointer, number: int, warm: WarmTrainer, world: World) -> dict[str, float]:
    synchronize(world.device)
    tensors = warm.trainer.state.tensors()
    stall = saver.save(number, tensors, {"healthy": True, "config": {}})
    began, steps = time.perf_counter(), 0
    while world.any(saver.in_flight):  # steps are collective
        warm.step()
        synchronize(world.device)
        steps += 1
    meanwhile = (time.perf_counter() - began) / max(1, steps)
    saver.wait()
    (report,) = saver.poll()
    return {
        "stall_ms": 1e3 * max(world.gather(stall)),
        "background_s": report.background_seconds,
        "gigabytes": report.bytes / 1e9,
        "step_meanwhile_ms": 1e3 * meanwhile,
    }


# ---------------------------------------------------------------------------- objective


def jepa(session: Session, path: str) -> Measured:
    """Time steps with the objective on and off, interleaved, as ``bench jepa`` does."""
    rounds, steps = (1, 1) if session.small else (5, 2)
    variants = jepa_bench.variants(session.warm(path).trainer)
    result = jepa_bench.measure(variants, rounds, steps, session.device)["variants"]
    names = {
        "absent / off, time ratio": "absent",
        "on / off, time ratio": "on",
    }
    figures = {figure: result[name]["ratio_to_off"] for figure, name in names.items()}
    extra = result["off"]["new_graphs"]
    off = [f"the objective compiles {extra} graph(s) while it is off"] if extra else []
    return Measured(figures, result, off)


# ---------------------------------------------------------------------------- replicas


def hsdp(session: Session, path: str) -> Measured:
    """Train a few steps with two replicas and compare the losses with sharding over all ranks."""
    config = session.config(path)
    losses = {replicas: _losses(config, session.world, replicas) for replicas in (1, 2)}
    worst = max(abs(a / b - 1) for a, b in zip(losses[2], losses[1], strict=True))
    off = []
    if not worst <= _HSDP_TOLERANCE:  # NaN, too
        off = [f"losses with two replicas differ by {worst:.2%} from those without: {losses}"]
    return Measured({"worst difference of losses %": 100 * worst}, {"losses": losses}, off)


def _losses(config: Config, world: World, replicas: int) -> list[float]:
    changes = {"dp_replicate": replicas, "dp_shard": -1}
    parallel = config.parallel.model_copy(update=changes)
    mesh = build_mesh(parallel, world.world_size, world.device)
    torch._dynamo.reset()
    config = config.model_copy(update={"parallel": parallel})
    trainer = build_trainer(config, replace(world, mesh=mesh))
    planner = Planner(trainer.config, TrainingClock())
    reports = []
    for number in itertools.islice(itertools.count(), _HSDP_STEPS):
        trainer.step(planner.plan(number))
        reports += trainer.segment.reduction.drain()
    trainer.segment.batches.close()
    del trainer
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return [report.values["ce"] for report in reports]
