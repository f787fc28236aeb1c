"""``parallel.attention``: the chosen kernel runs, whatever the compiler's caches contain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.profiler import ProfilerActivity, profile

from jepa_dist.build import chosen_attention
from jepa_dist.config import ModelConfig, ParallelConfig
from jepa_dist.errors import UserError
from jepa_dist.model.layers import causal_attention
from jepa_dist.parallel.attention import bind_attention
from tests.support.commands import run_command

CPU = torch.device("cpu")
MODEL = ModelConfig(num_heads=4, num_kv_heads=2, model_dim=64, seq_len=32)
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 32, 16), (2, 2, 32, 16), (2, 2, 32, 16)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    ("wanted", "chosen"), [("auto", "flash"), ("flash", "flash"), ("math", "math")]
)
def test_kernels_of_the_cpu(wanted: Any, chosen: str) -> None:
    assert chosen_attention(MODEL, ParallelConfig(attention=wanted), CPU) == chosen


@pytest.mark.parametrize("wanted", ["cudnn", "efficient", "flex"])
def test_kernels_that_the_cpu_lacks_are_refused(wanted: Any) -> None:
    with pytest.raises(UserError) as caught:
        chosen_attention(MODEL, ParallelConfig(attention=wanted), CPU)
    (problem,) = caught.value.problems
    assert problem.startswith(f"parallel.attention={wanted}: ")
    assert "parallel.attention=auto" in problem


@pytest.mark.parametrize("name", ["flash", "math", "efficient"])
def test_same_result(name: str) -> None:
    """``efficient`` repeats the grouped heads; here it falls back to the CPU's kernels."""
    q, k, v = inputs()
    groups = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    scores = q @ groups[0].transpose(-1, -2) / 16**0.5
    hidden = torch.ones(32, 32).triu(1).bool()
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ groups[1]
    bound = bind_attention(causal_attention, name, others=name == "efficient")
    torch.testing.assert_close(bound(q, k, v, None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_compiled_graph_holds_the_chosen_kernel(name: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        bind_attention(causal_attention, name),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record),
    )
    compiled(*inputs(), None).sum().backward()
    forward = [str(node.target) for node in graphs[0].graph.nodes]
    assert any(FLASH in target for target in forward) == (name == "flash")
    assert any("softmax" in target for target in forward) == (name == "math")


@pytest.mark.slow
def test_a_warm_cache_does_not_serve_another_kernel(tmp_path: Path) -> None:
    """Each process compiles with the cache that those before it left."""
    environ = {"TORCHINDUCTOR_CACHE_DIR": tmp_path, "TORCHINDUCTOR_COMPILE_THREADS": 1}
    for hits in (0, 1):
        command = (sys.executable, "-m", "tests.test_attention")
        finished = run_command(*command, environ=environ, timeout=240)
        assert finished.code == 0, finished.output
        for name in ("flash", "math"):
            assert f"kernel {name}, cache hits {hits}" in finished.output, finished.output


def _report(name: str) -> None:
    """Compile and run one choice; print what ran and what came from the cache."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(bind_attention(causal_attention, name), fullgraph=True)
    compiled(*inputs(), None).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        compiled(*inputs(), None).sum().backward()
    ran = {event.key for event in profiled.key_averages()}
    kernel = "flash" if f"aten::{FLASH}" in ran else "math" if "aten::bmm" in ran else "neither"
    print(f"kernel {kernel}, cache hits {counters['aot_autograd']['autograd_cache_hit']}")


if __name__ == "__main__":
    _report("flash")
    _report("math")
