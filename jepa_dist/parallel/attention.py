"""Selection of the attention kernel (``parallel.attention``) inside compiled regions.

SDPA selects a kernel when a region is traced, by device, shapes and process-wide switches, and the
compiled graph keeps it. The switches are not part of the key of the compiler's disk cache, which
would return a graph with the kernel of an earlier run. Therefore the kernel is chosen once, at the
start, and the region itself enters ``sdpa_kernel``, so that different kernels have different keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from jepa_dist.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Causal attention: query [B, H, T, C], key and value [B, K, T, C], numbers of documents [B, T] or
None -> [B, H, T, C]."""

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_NAMES = {backend.value: name for name, backend in _SDPA.items()}

# Functions that ``sdpa_kernel`` adds to a region's graph. Their arguments are part of the graph and
# thereby of the cache key, so they are safe to cache; unless they are marked as such, AOTAutograd
# traces and partitions the regions again at every start.
_TRACED = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")


def choose_attention(
    wanted: str,
    query: torch.Size,
    key: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    masks_documents: bool = False,
    is_compiled: bool = True,
) -> str:
    """Return the name of the kernel that attention will run.

    Args:
        wanted: ``parallel.attention``; ``auto`` is resolved to PyTorch's choice for these tensors,
            or to FlexAttention where documents are masked, regions compiled, and the device can.
        query: Shape of the queries, [B, H, T, C].
        key: Shape of keys and values, [B, K, T, C].
        dtype: Dtype of the computation.
        device: Device of the computation.
        masks_documents: Attention must not cross documents.
        is_compiled: Regions are compiled.

    Raises:
        UserError: this device cannot run that kernel on such tensors, forward and backward.
    """
    can_flex = device.type == "cuda"  # PyTorch implements its backward on CUDA only
    chosen: str | None
    if wanted == "flex":
        chosen = wanted if can_flex else None
    elif wanted == "auto" and masks_documents and is_compiled and can_flex:
        chosen = "flex"  # the only one that skips masked blocks
    else:
        names = list(_SDPA) if wanted == "auto" else [wanted]
        chosen = _sdpa_choice(names, query, key, dtype, device, masks_documents)
    if chosen is None:
        mask = " and model.document_mask" if masks_documents else ""
        raise UserError(
            f"parallel.attention={wanted}: cannot run on {_describe(device)} with {dtype} and head "
            f"width {query[-1]}{mask}{_excluded(wanted)}; fix: parallel.attention=auto"
        )
    return chosen


def _sdpa_choice(
    names: list[str],
    query: torch.Size,
    key: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    masks_documents: bool,
) -> str | None:
    """Return which of these kernels SDPA would run; None if it can run none of them."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
    q, k = torch.empty(query, **options), torch.empty(key, **options)
    if names == ["efficient"]:
        k = _repeat_heads(k, q)
    mask = None
    if masks_documents:
        mask = torch.ones(q.size(0), 1, q.size(2), q.size(2), dtype=torch.bool, device=device)
    try:
        with sdpa_kernel([_SDPA[name] for name in names]):
            choice = torch._fused_sdp_choice(
                q, k, k, mask, 0.0, mask is None, enable_gqa=q.size(1) != k.size(1)
            )
    except RuntimeError:  # "No viable backend"
        return None
    return _NAMES.get(choice)


def bind_attention(attend: Attend, name: str, *, others: bool = False) -> Attend:
    """Return ``attend`` bound to one kernel, for eager and compiled use.

    Args:
        attend: Calls ``scaled_dot_product_attention``.
        name: From ``choose_attention``.
        others: Fall back to other kernels for tensors that this one does not support (``auto``).
    """
    _make_cacheable()
    if name == "flex":
        return _flex
    backends = [_SDPA[name]]
    if others:
        backends += [backend for backend in _SDPA.values() if backend not in backends]

    def bound(
        q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None
    ) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return attend(q_BHTC, k_BKTC, v_BKTC, documents_BT)

    def repeated(
        q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None
    ) -> Tensor:
        k_BHTC, v_BHTC = _repeat_heads(k_BKTC, q_BHTC), _repeat_heads(v_BKTC, q_BHTC)
        return bound(q_BHTC, k_BHTC, v_BHTC, documents_BT)

    return repeated if name == "efficient" else bound


def _repeat_heads(x_BKTC: Tensor, q_BHTC: Tensor) -> Tensor:
    """Repeat grouped heads, for the kernel without GQA support; returns [B, H, T, C]."""
    return x_BKTC.repeat_interleave(q_BHTC.size(1) // x_BKTC.size(1), dim=1)


def _flex(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Compute FlexAttention, which skips completely masked blocks."""
    length = q_BHTC.size(2)
    if documents_BT is None:
        mask = create_block_mask(_is_visible, None, None, length, length, device=q_BHTC.device)
    else:

        def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = documents_BT[batch, query] == documents_BT[batch, key]
            return _is_visible(batch, head, query, key) & same

        rows = q_BHTC.size(0)
        mask = create_block_mask(is_visible, rows, None, length, length, device=q_BHTC.device)
    grouped = q_BHTC.size(1) != k_BKTC.size(1)
    attended = flex_attention(q_BHTC, k_BKTC, v_BKTC, block_mask=mask, enable_gqa=grouped)
    assert isinstance(attended, Tensor)
    return attended


def _is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _make_cacheable() -> None:
    marked = torch._inductor.config.unsafe_marked_cacheable_functions
    torch._inductor.config.unsafe_marked_cacheable_functions = {
        **marked,
        **dict.fromkeys(_TRACED, torch.__version__),
    }


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU"
    return torch.cuda.get_device_name(device)


def _excluded(wanted: str) -> str:
    """Return a note that deterministic algorithms exclude cuDNN, if that may be the reason."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return " under parallel.deterministic" if deterministic and wanted == "cudnn" else ""
