"""Compile every region of configurations for sm_90; count kernels, bytes and FLOPs of each graph.

``python -m tests.without_gpu.regions OUT CONFIG...``, in the environment of ``environment.py``.
The graphs are those that the trainer compiles: one for all regions that are alike, in training and
(without gradient) in validation. Blocks are compiled with both back ends of attention and in all
modes of activation checkpointing; nothing else depends on these.

Bytes are what Inductor counts for the kernels it generates: every buffer that a kernel reads or
writes, once. Matrix products and attention are library calls, whose operands do not count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_dist.config import Config, load
from jepa_dist.model.execution import LAST_PHASE
from jepa_dist.model.gpt import GPT
from jepa_dist.objectives.objective import Objective
from jepa_dist.objectives.registry import OBJECTIVES
from jepa_dist.parallel.shard import checkpoint_activations
from tests.without_gpu import pretend
from tests.without_gpu.table import ATTENTION, CHECKPOINTING, Graph, Table

_MOST_GRAPHS = 32

# ---------------------------------------------------------------------------- one model


class Compiler:
    """A backend for Dynamo that compiles for sm_90 and counts what it generates.

    Args:
        assembler: Takes note of the kernels that are assembled.
        labels: Fields that all graphs have alike, ``config`` among them.
        block_labels: Fields that the graphs of blocks have besides.
    """

    def __init__(
        self,
        assembler: pretend.Assembler,
        labels: dict[str, Any],
        block_labels: dict[str, Any],
    ) -> None:
        self._assembler = assembler
        self._labels, self._block_labels = labels, block_labels
        self._region = ""
        self._counts: list[dict[str, Any]] = []
        self._runs: Counter[tuple[str, str]] = Counter()
        self._phase = ""

    def compile(self, name: str, region: nn.Module) -> None:
        """Compile a region at its first call, as ``jepa_dist.parallel.shard.compile_region``."""
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        region.compile(backend=self, fullgraph=True, dynamic=False)
        compiled: Any = region._compiled_call_impl

        def named(*args: Any, **kwargs: Any) -> Any:
            self._region = name
            return compiled(*args, **kwargs)

        region._compiled_call_impl = named

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph; return a function that runs it uncompiled and counts the execution."""
        name = self._region
        with self._recording():
            compile_fx(module, inputs)

        def run(*args: Any) -> Any:
            if torch.is_grad_enabled():
                self._runs[name, self._phase] += 1
            return module.forward(*args)

        return run

    @contextmanager
    def counting_runs(self, phase: int) -> Iterator[None]:
        """Count executions inside as those of a pass in this phase."""
        self._phase = str(phase)
        yield
        self._phase = ""

    def graphs(self) -> Iterator[Graph]:
        """Return the compiled graphs."""
        for counts in self._counts:
            region = counts["region"]
            runs = {
                phase: count
                for (name, phase), count in self._runs.items()
                if name == region and phase
            }
            of_block = self._block_labels if region.startswith("blocks.") else {}
            yield Graph(**self._labels, **of_block, **counts, runs=runs)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Count Inductor's graphs as soon as their kernels are assembled."""
        lowering: Any = GraphLowering
        compile_to_module = lowering.compile_to_module

        def recorded(graph: GraphLowering) -> Any:
            kernels, cubins = self._assembler.kernels, self._assembler.cubins
            began = time.process_time()
            result = compile_to_module(graph)
            self._counts.append(
                {
                    "region": self._region,
                    "direction": _direction(graph),
                    **_count(graph),
                    "sources": len(graph.wrapper_code.src_to_kernel),
                    "cubins": self._assembler.cubins - cubins,
                }
            )
            assert self._assembler.kernels - kernels == self._counts[-1]["sources"]
            seconds = time.process_time() - began
            names = [*self._labels.values(), *self._block_labels.values(), self._region]
            print(*names, _direction(graph), f"{seconds:.1f} s", file=sys.stderr, flush=True)
            return result

        lowering.compile_to_module = recorded
        try:
            yield
        finally:
            lowering.compile_to_module = compile_to_module


def _direction(graph: GraphLowering) -> str:
    if graph.is_backward:
        return "backward"
    return "validation" if graph.is_inference else "forward"


def _count(graph: GraphLowering) -> dict[str, Any]:
    """Return kernels, bytes, library calls and FLOPs of a graph that Inductor has scheduled."""
    kernels = moved = flops = 0
    calls: Counter[str] = Counter()
    for node in graph.scheduler.nodes:
        kind = type(node).__name__
        if kind == "ExternKernelSchedulerNode":
            calls[_function(node.node)] += 1
            flops += node.estimate_flops() or 0
        elif "Nop" not in kind:
            kernels += 1
            moved += node.get_read_write_buffers_sizes()
    del calls["MultiOutput"]  # not a call, but one of several results
    return {"kernels": kernels, "bytes": int(moved), "calls": dict(calls), "flops": int(flops)}


def _function(node: Any) -> str:
    """Return the bare name of a library function: ``extern_kernels.mm`` is ``mm``."""
    name = str(getattr(node, "python_kernel_name", None) or type(node).__name__)
    return name.removesuffix(".default").rpartition(".")[2]


# ---------------------------------------------------------------------------- one configuration


def compile_config(path: Path) -> tuple[list[Graph], dict[str, str]]:
    """Return all graphs of a configuration, and the errors of variants that do not compile."""
    config = load(path, [], {}).config
    graphs: dict[str, Graph] = {}
    failures = {}
    for attention in ATTENTION:
        pretend.attend_with(attention)
        for checkpointing in CHECKPOINTING:
            variant = {"attention": attention, "checkpointing": checkpointing}
            compiler = Compiler(_ASSEMBLER, {"config": path.stem}, variant)
            try:
                _compile_variant(config, compiler, checkpointing, only_blocks=bool(graphs))
            except Exception as error:
                failures[" ".join([path.stem, *variant.values()])] = _summary(error)
            graphs |= {graph.key: graph for graph in compiler.graphs()}
            torch._dynamo.reset()
    return list(graphs.values()), failures


def _compile_variant(
    config: Config, compiler: Compiler, checkpointing: str, *, only_blocks: bool
) -> None:
    """Compile what the trainer's warm-up compiles, or only its blocks."""
    with torch.device("meta"):
        model = GPT(config.model)
    for name, region in model.regions():
        if name.startswith("blocks."):
            checkpoint_activations(region, checkpointing)
        if name.startswith("blocks.") or not only_blocks:
            compiler.compile(name, region)
    objectives = [] if only_blocks else list(_objectives(config))
    for objective in objectives:
        compiler.compile(f"objective.{objective.config.jepa.objective}", objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, *objectives):
            module._apply(_gathered)
        _run(model, objectives, config, compiler, checkpointing)


def _objectives(config: Config) -> Iterator[Objective]:
    """Yield every objective, with its defaults otherwise."""
    for name, kind in OBJECTIVES.items():
        jepa = config.jepa.model_copy(update={"objective": name})
        with torch.device("meta"):
            yield kind(config.model_copy(update={"jepa": jepa}), bos_id=None)


def _gathered(tensor: Tensor) -> Tensor:
    """Return a parameter as the compiler sees it, in bfloat16; buffers keep their dtype."""
    dtype = torch.bfloat16 if tensor.is_meta else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=pretend.DEVICE)


def _run(
    model: GPT,
    objectives: Sequence[Objective],
    config: Config,
    compiler: Compiler,
    checkpointing: str,
) -> None:
    """Run the passes that compile everything: with and without gradient, in every phase."""
    shape = (config.batch.micro, config.model.seq_len)
    tokens = torch.zeros(shape, dtype=torch.int64, device=pretend.DEVICE)
    weight = torch.ones(shape[0], device=pretend.DEVICE)
    for phase in range(LAST_PHASE + 1) if config.model.num_loops else [0]:
        with compiler.counting_runs(phase):
            model(tokens, tokens, weight, phase=phase)
        if checkpointing == "none":  # checkpointing affects gradients only
            with torch.no_grad():
                model(tokens, tokens, weight, phase=phase)
    for objective in objectives:
        sampled = objective.sample_shape(objective.config)
        samples = None if sampled is None else tokens.new_ones((shape[0], *sampled))
        layer = model.output_layer().detached() if objective.reads_output_layer else None
        states = model(tokens, tokens, weight, taps=objective.taps).taps
        with compiler.counting_runs(0):
            objective(states, tokens, weight, samples, layer)


def _summary(error: Exception) -> str:
    """Return the error and its line in this project, on one line."""
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "jepa_dist" in frame.filename
    ]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]} (at {places[-1] if places else 'the compiler'})"


# ---------------------------------------------------------------------------- command

_ASSEMBLER = pretend.Assembler()


def _start(folder: str) -> None:
    """Set up a process that compiles."""
    global _ASSEMBLER
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{os.getpid()}"
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"  # shared: equal kernels are compiled once
    torch.set_num_threads(1)
    pretend.pretend_device()
    _ASSEMBLER = pretend.pretend_compiler()


def main() -> None:
    """Compile the configurations of the command line and write their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the table")
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            arguments.processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(folder,),
        ) as pool,
    ):
        table = Table(str(torch.__version__), ())
        for found, failed in pool.map(compile_config, arguments.configs):
            graphs, failures = (*table.graphs, *found), {**table.failures, **failed}
            table = Table(table.torch, graphs, failures, time.monotonic() - began)
            table.write(arguments.out)  # a partial table, in case the rest takes too long


if __name__ == "__main__":
    main()
