"""Layout of TensorBoard's page "Custom Scalars": the overview of a run.

Tags are patterns (regular expressions over the whole tag). docs/monitoring.md explains the charts;
a test checks that every metric of a run is in one of them.
"""

from __future__ import annotations

from typing import Any


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"^{tag}$" for tag in tags]]


LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1 Is it learning?": {
        "validation, bits per byte": _lines("val/(ema_)?bpb(/.*)?"),
        "validation, nats per token": _lines("val/(ema_)?loss(/.*)?"),
        "cross-entropy and total": _lines("loss/ce", "loss/total"),
        "JEPA loss": _lines("loss/jepa"),
        "JEPA loss relative to no structure": _lines("jepa/relative"),
    },
    "2 Is it fast?": {
        "tokens per second": _lines("tokens_per_second"),
        "MFU": _lines("mfu"),
        "seconds per step, by phase": _lines("time/.*"),
        "stragglers": _lines("straggler/.*"),
        "memory, GiB": _lines("memory/.*"),
    },
    "3 Is it healthy?": {
        "gradient norm": _lines("grad_norm"),
        "share of steps clipped": _lines("clipped_share"),
        "update relative to weight": _lines("update_ratio/.*"),
        "learning rates": _lines("lr/.*"),
        "steps without update, recompiles": _lines("bad_steps", "compile/.*"),
    },
    "4 Is the objective alive?": {
        "gradient relative to cross-entropy's": _lines("jepa/grad_ratio"),
        "gradients' cosine": _lines("jepa/grad_cos"),
        "directions in use": _lines(
            "jepa/effective_rank", "jepa/participation_ratio", "jepa/target_effective_rank"
        ),
        "anisotropy": _lines("jepa/mean_cosine", "jepa/target_mean_cosine"),
        "spread": _lines("jepa/std"),
        "straightness": _lines("jepa/straightness", "jepa/cos"),
        "short-cuts": _lines(
            "jepa/clock_share", "jepa/sink_share", "jepa/mean_share", "jepa/document_share"
        ),
        "inside and across documents": _lines("jepa/within_doc", "jepa/cross_doc"),
        "weight": _lines("jepa/lambda"),
        "next_latent: distance, KL divergence": _lines("jepa/distance", "jepa/kl"),
        "at the floor, not counted": _lines(
            "jepa/floored", "jepa/rows_without_span", "jepa/counted"
        ),
    },
    "5 Does it last?": {
        "goodput": _lines("goodput/productive_share"),
        "starts and failures": _lines("goodput/starts", "goodput/failures"),
        "checkpoints, seconds": _lines("checkpoint/.*_seconds"),
        "checkpoints, slowdown": _lines("checkpoint/slowdown"),
        "checkpoints, bytes": _lines("checkpoint/bytes"),
        "start-up, seconds": _lines("startup/.*"),
        "seconds": _lines("train_seconds", "goodput/wall_seconds"),
        "tokens trained on": _lines("tokens"),
        "mixture, share of each source": _lines("mixture/share/.*"),
        "mixture, epochs of each source": _lines("mixture/epochs/.*"),
        "mixture, loss of each source": _lines("loss/ce/.*"),
    },
    "6 The host of rank 0": {
        "processor, memory, %": _lines("system/cpu_percent", "system/memory_percent"),
        "GPU, %": _lines("system/gpu_percent"),
        "GPU, degrees C": _lines("system/gpu_celsius"),
        "disk free, GiB": _lines("system/disk_free_gib"),
        "progress and recurrence phase": _lines("progress", "phase"),
    },
}
