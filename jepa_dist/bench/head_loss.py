"""Output projection, soft cap and cross-entropy: chunked versus full logits, both compiled.

Times are of forward and backward. Memory is the peak besides the inputs, including the gradients of
states and projection. Errors are relative to full logits in float32 without compilation.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jepa_dist.bench.common import markdown_table, time_interleaved
from jepa_dist.bench.peak_memory import peak_bytes
from jepa_dist.errors import UserError
from jepa_dist.model.head import Rows, chunked_loss_sum, loss_sum, num_chunks

_SOFTCAP = 30.0
_MIB = 2**20

Loss = Callable[[Rows, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m jepa_dist.bench head``."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[256, 8192, 50304, 128256], metavar="V"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=16384 if on_cuda else 2048,
        help="sequences times their length (default: %(default)s)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=2048 if on_cuda else 128,
        help="width of the states (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16" if on_cuda else "float32",
        help="dtype of states and projection (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each form")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each vocabulary size.

    Raises:
        UserError: a number below 1.
    """
    numbers = (*arguments.vocab, arguments.rows, arguments.width, arguments.rounds)
    if min(numbers) < 1:
        raise UserError("bench head: --vocab, --rows, --width and --rounds must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {name: getattr(arguments, name) for name in ("rows", "width", "dtype", "rounds")}
    return {**sizes, "runs": [_measure(vocab, device, **sizes) for vocab in arguments.vocab]}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = []
    for run in result["runs"]:
        full, chunked = run["forms"]["full"], run["forms"]["chunked"]
        rows.append(
            (
                run["vocab"],
                run["chunks"],
                "chunked" if run["chosen_chunks"] > 1 else "full",
                f"{full['milliseconds']:.1f}",
                f"{chunked['milliseconds']:.1f}",
                f"{run['time_ratio']:.2f}",
                f"{full['peak_bytes'] / _MIB:,.1f}",
                f"{chunked['peak_bytes'] / _MIB:,.1f}",
                f"{chunked['peak_bytes'] / full['peak_bytes']:.2f}",
                f"{full['loss_error']:.0e}, {full['gradient_error']:.0e}",
                f"{chunked['loss_error']:.0e}, {chunked['gradient_error']:.0e}",
            )
        )
    columns = (
        "V",
        "chunks",
        "used",
        "full, ms",
        "chunked, ms",
        "ratio",
        "full, MiB",
        "chunked, MiB",
        "ratio",
        "full: error of loss, gradients",
        "chunked: error",
    )
    head = (
        f"{result['rows']} rows of width {result['width']} in {result['dtype']}; median of "
        f"{result['rounds']} rounds, ratio of times: median over rounds"
    )
    return f"{head}\n\n{markdown_table(columns, rows)}"


def _measure(
    vocab: int, device: torch.device, *, rows: int, width: int, dtype: str, rounds: int
) -> dict[str, Any]:
    torch._dynamo.reset()
    chosen = num_chunks(rows, vocab)
    chunks = max(2, chosen)  # where full logits are used: the cost of chunks
    inputs = _inputs(vocab, rows, width, getattr(torch, dtype), device)
    forms: dict[str, Loss] = {
        "full": functools.partial(_compiled(loss_sum), softcap=_SOFTCAP),
        "chunked": functools.partial(_compiled(chunked_loss_sum), softcap=_SOFTCAP, chunks=chunks),
    }
    exact = _exact(*inputs)
    calls = {name: functools.partial(_gradients, form, *inputs) for name, form in forms.items()}
    errors = {name: _errors(call(), exact) for name, call in calls.items()}  # compiles, too
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    seconds = time_interleaved(calls, rounds, device)
    ratios = [b / a for a, b in zip(seconds["full"], seconds["chunked"], strict=True)]
    return {
        "vocab": vocab,
        "chunks": chunks,
        "chosen_chunks": chosen,
        "time_ratio": statistics.median(ratios),
        "forms": {
            name: {
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "seconds_of_each_round": seconds[name],
                "peak_bytes": peaks[name],
                "loss_error": errors[name][0],
                "gradient_error": max(errors[name][1:]),
            }
            for name in forms
        },
    }


def _compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def _inputs(
    vocab: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Rows, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y_NE = torch.randn(rows, width, generator=generator)
    head_VE = torch.randn(vocab, width, generator=generator) / width**0.5
    targets_N = torch.randint(vocab, (rows,), generator=generator)
    y_NE, head_VE = (t.to(device, dtype).requires_grad_() for t in (y_NE, head_VE))
    return Rows(y_NE, targets_N.to(device), torch.ones(rows, device=device)), head_VE


def _gradients(loss: Loss, rows: Rows, head_VE: Tensor) -> list[Tensor]:
    """Return the loss per row and its gradients with respect to states and projection."""
    value = loss(rows, head_VE) / len(rows.y_NE)
    return [value.detach(), *torch.autograd.grad(value, [rows.y_NE, head_VE])]


def _exact(rows: Rows, head_VE: Tensor) -> list[Tensor]:
    y_NE, matrix = (t.detach().float().requires_grad_() for t in (rows.y_NE, head_VE))
    full = functools.partial(loss_sum, softcap=_SOFTCAP)
    return _gradients(full, rows._replace(y_NE=y_NE), matrix)


def _errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return the relative errors in the Euclidean norm."""
    return [
        (torch.linalg.norm(a.float() - b) / torch.linalg.norm(b)).item()
        for a, b in zip(found, expected, strict=True)
    ]
