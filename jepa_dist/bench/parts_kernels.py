"""Parts of ``bench gpu`` that time single kernels of a configuration's step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jepa_dist.bench.common import milliseconds
from jepa_dist.bench.muon_routes import matrix_shapes
from jepa_dist.bench.session import Measured, Session, Skipped
from jepa_dist.config import Config
from jepa_dist.model.head import num_chunks
from jepa_dist.optim.newton_schulz import FIXED, POLAR_EXPRESS, cost, orthogonalize
from jepa_dist.parallel.shard import compute_dtype

_BACKENDS = {
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
# FLOPs of forward and backward relative to forward: 2 matrix products forward, 5 backward.
_FORWARD_AND_BACKWARD = 3.5


def attention(session: Session, path: str) -> Measured:
    """Time causal attention on one micro-batch with each backend that supports these shapes."""
    config = session.settings.config(path)
    model, device = config.model, session.device
    q_BHTC, k_BKTC, v_BKTC = (
        torch.randn(
            (config.batch.micro, model.seq_len, heads, model.head_dim),
            device=device,
            dtype=compute_dtype(config.parallel, device),
        )
        .transpose(1, 2)
        .requires_grad_()
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )
    # Causal: half of 2 products of 2 T x T x C operations per head.
    tflop = 2 * config.batch.micro * model.num_heads * model.seq_len**2 * model.head_dim / 1e12
    figures: dict[str, float] = {}
    reasons: dict[str, str] = {}
    chosen = _chosen(q_BHTC, k_BKTC, v_BKTC)
    for name, backend in _BACKENDS[device.type].items():
        try:
            forward, both = _attention_ms(backend, (q_BHTC, k_BKTC, v_BKTC))
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reasons[name] = str(error).partition("\n")[0]
            continue
        figures[f"{name}, forward TFLOP/s"] = 1e3 * tflop / forward
        figures[f"{name}, forward and backward TFLOP/s"] = (
            1e3 * _FORWARD_AND_BACKWARD * tflop / both
        )
    notes = [
        f"torch chooses {chosen}",
        *(f"{name} does not support these shapes: {reason}" for name, reason in reasons.items()),
    ]
    return Measured(figures, {"chosen": chosen, "not_available": reasons}, notes=notes)


def _chosen(q: Tensor, k: Tensor, v: Tensor) -> str:
    gqa = q.size(1) != k.size(1)
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=gqa)
    return SDPBackend(choice).name


def _attention_ms(
    backend: SDPBackend, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """Return the milliseconds of forward, and of forward and backward."""
    q, k, v = inputs
    gqa = q.size(1) != k.size(1)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    with sdpa_kernel([backend]):
        gradient = torch.randn_like(forward())
        with torch.no_grad():
            forward_ms = milliseconds(forward, q.device)
        both_ms = milliseconds(lambda: torch.autograd.grad(forward(), inputs, gradient), q.device)
    return forward_ms, both_ms


def matrices(session: Session, path: str) -> Measured:
    """Time the matrix products of a block and of the head's chunk: forward and both gradients."""
    config = session.settings.config(path)
    device, dtype = session.device, compute_dtype(config.parallel, session.device)
    details = {
        f"{name} {direction}": {"ms": ms, "TFLOP/s": 1e3 * tflop / ms, "tflop": tflop}
        for name, (rows, inner, outer) in _products(config).items()
        for direction, ms, tflop in _product_ms(rows, inner, outer, device, dtype)
    }
    block = [row for name, row in details.items() if name.startswith("block ")]
    head = [row for name, row in details.items() if name.startswith("head ")]
    figures = {
        "block, all products TFLOP/s": _rate(block),
        "block, slowest product TFLOP/s": min(row["TFLOP/s"] for row in block),
        "head TFLOP/s": _rate(head),
    }
    return Measured(figures, details)


def _products(config: Config) -> dict[str, tuple[int, int, int]]:
    """Return rows, inner and outer width of each product ``x[rows, inner] @ w[inner, outer]``."""
    model = config.model
    rows, width = config.batch.micro * model.seq_len, model.model_dim
    kv_width = model.num_kv_heads * model.head_dim
    chunk = rows // num_chunks(rows, model.vocab_size)
    return {
        "block q": (rows, width, width),
        "block k": (rows, width, kv_width),
        "block v": (rows, width, kv_width),
        "block out": (rows, width, width),
        "block fc": (rows, width, model.mlp_hidden),
        "block proj": (rows, model.mlp_hidden, width),
        "qkv in one": (rows, width, width + 2 * kv_width),
        "head chunk": (chunk, model.embed_width, model.vocab_size),
    }


def _product_ms(
    rows: int, inner: int, outer: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, float, float]]:
    """Return direction, milliseconds and TFLOP of a product and of its gradients."""
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    w = torch.randn(outer, inner, device=device, dtype=dtype)
    dy = torch.randn(rows, outer, device=device, dtype=dtype)
    tflop = 2 * rows * inner * outer / 1e12
    return [
        ("forward", milliseconds(lambda: x @ w.T, device), tflop),
        ("gradient of input", milliseconds(lambda: dy @ w, device), tflop),
        ("gradient of weight", milliseconds(lambda: dy.T @ x, device), tflop),
    ]


def _rate(rows: list[dict[str, float]]) -> float:
    return 1e3 * sum(row["tflop"] for row in rows) / sum(row["ms"] for row in rows)


def newton_schulz(session: Session, path: str) -> Measured:
    """Time the orthogonalization of all matrices on a single rank.

    Raises:
        Skipped: the configuration's matrices are not updated by Muon.
    """
    config = session.settings.config(path)
    if config.optim.matrix != "muon":
        raise Skipped(f"optim.matrix={config.optim.matrix}")
    device, steps = session.device, config.optim.muon_backend_steps
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = POLAR_EXPRESS if config.optim.muon_coefficients == "polar_express" else FIXED
    shapes = list(matrix_shapes(config).values())
    updates = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    tflop = steps * sum(2 * cost(*shape) for shape in shapes) / 1e12
    ms = milliseconds(lambda: orthogonalize(updates, table, steps, dtype), device, repeat=3)
    return Measured({"all matrices ms": ms, "TFLOP/s": 1e3 * tflop / ms}, {"count": len(shapes)})
