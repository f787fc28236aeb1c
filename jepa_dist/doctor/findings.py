"""Per-rank reports, the problems found in them, and the table that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Ratios to the median below which a rank is slow. Identical machines differ by a few percent, links
# that share a switch by more.
_SLOW_MATMUL, _SLOW_RING = 0.8, 0.5
_CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Report:
    """One rank's measurements."""

    rank: int
    node: str
    versions: dict[str, str]
    """Must be identical on all nodes: torch, driver, NCCL, device, ... (``-``: none)."""
    interface: str
    """Name and address of the interface used to reach the rendezvous."""
    clock_ahead: float
    """Seconds by which this node's clock is ahead of rank 0's."""
    clock_error: float
    free_gib: float
    files: str
    """Problem with the shared folder; empty if there is none."""
    has_hidden_gpu: bool
    """Whether there is a GPU that torch cannot use."""
    matmul_tflops: float
    ring_gbps: float | None


def findings(reports: Sequence[Report], folder: str, need_gib: float) -> list[str]:
    """Return one line for each problem."""
    return [
        *_versions_differ(reports),
        *_per_node(reports, lambda report: _wrong_on_node(report, folder, need_gib)),
        *_slow("matmul", "TFLOP/s", _SLOW_MATMUL, [(r, r.matmul_tflops) for r in reports]),
        *_slow("link", "GB/s", _SLOW_RING, [(r, r.ring_gbps) for r in reports]),
    ]


def _versions_differ(reports: Sequence[Report]) -> Iterable[str]:
    for name in reports[0].versions:
        nodes_by_value: dict[str, list[str]] = {}
        for report in reports:
            nodes_by_value.setdefault(report.versions[name], []).append(report.node)
        if len(nodes_by_value) > 1:
            yield f"{name} differs: " + "; ".join(
                f"{value} on {', '.join(dict.fromkeys(nodes))}"
                for value, nodes in nodes_by_value.items()
            )


def _per_node(reports: Sequence[Report], wrong: Callable[[Report], Iterable[str]]) -> Iterable[str]:
    """Return each distinct line once, although several ranks of a node report it."""
    lines = (f"{report.node}: {line}" for report in reports for line in wrong(report))
    return dict.fromkeys(lines)


def _wrong_on_node(report: Report, folder: str, need_gib: float) -> Iterable[str]:
    if abs(report.clock_ahead) - report.clock_error > _CLOCK_SECONDS:
        side = "ahead of" if report.clock_ahead > 0 else "behind"
        yield (
            f"clock {abs(report.clock_ahead):.1f} s {side} that of rank 0; "
            "set it by NTP (chronyc tracking)"
        )
    if report.files:
        yield f"{folder}: {report.files}; all nodes must share it (--dir)"
    if report.free_gib < need_gib:
        yield f"{folder}: {report.free_gib:.1f} GiB free, less than {need_gib:g} (--need-gib)"
    if report.has_hidden_gpu:
        yield "has a GPU that torch cannot use; compare the driver with torch's CUDA version"


def _slow(
    what: str, unit: str, share: float, measured: Sequence[tuple[Report, float | None]]
) -> Iterable[str]:
    known = [(report, value) for report, value in measured if value is not None]
    if not known:
        return
    median = statistics.median(value for _, value in known)
    for report, value in known:
        if value < share * median:
            yield (
                f"rank {report.rank} on {report.node}: {what} {value:.3g} {unit}, "
                f"{value / median:.0%} of the median {median:.3g}"
            )


# ---------------------------------------------------------------------------- table


def table(reports: Sequence[Report]) -> list[str]:
    """Return a header and one line per rank."""
    header = [
        *("rank", "node", *reports[0].versions, "interface"),
        *("clock", "free", "files", "matmul", "link"),
    ]
    rows = [header, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(report: Report) -> list[str]:
    return [
        str(report.rank),
        report.node,
        *report.versions.values(),
        report.interface,
        f"{report.clock_ahead:+.3f} s",
        f"{report.free_gib:,.0f} GiB",
        "differ" if report.files else "same",
        f"{report.matmul_tflops:.3g} TFLOP/s",
        "-" if report.ring_gbps is None else f"{report.ring_gbps:.3g} GB/s",
    ]
