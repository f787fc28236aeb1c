"""Count collectives at launch, and the bytes that a rank sends.

The bytes include a rank's own part: the input of an all-to-all or reduce-scatter, the output of an
all-gather, twice the tensor of an all-reduce, the tensor of a broadcast. With W ranks, (W - 1) / W
of them are sent to other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Kind and bytes sent per operator.
_COLLECTIVES: dict[str, tuple[str, Callable[[Any], int]]] = {
    "c10d::alltoall_base_": ("all_to_all", lambda args: args[1].nbytes),
    "c10d::allreduce_": ("all_reduce", lambda args: 2 * sum(t.nbytes for t in args[0])),
    "c10d::_allgather_base_": ("all_gather", lambda args: args[0].nbytes),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda args: args[1].nbytes),
    "c10d::broadcast_": ("broadcast", lambda args: sum(t.nbytes for t in args[0])),
    "_c10d_functional::all_gather_into_tensor": (
        "all_gather",
        lambda args: args[0].nbytes * args[1],
    ),
    "_c10d_functional::all_reduce": ("all_reduce", lambda args: 2 * args[0].nbytes),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", lambda args: args[0].nbytes),
}
_NOT_COLLECTIVES = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class CollectiveCounter(TorchDispatchMode):
    """Dispatch mode that counts the collectives called within, by kind, and the bytes sent.

    For eager code only: a compiled region raises under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def sent(self) -> int:
        """Bytes sent by all kinds of collectives."""
        return self.bytes.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count a collective on plain tensors; DTensors are unwrapped by their own dispatch."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and func.name() not in _NOT_COLLECTIVES:
            if func.name() not in _COLLECTIVES:
                raise RuntimeError(f"{func.name()}: this benchmark cannot count it")
            kind, sent_bytes = _COLLECTIVES[func.name()]
            self.counts[kind] += 1
            self.bytes[kind] += sent_bytes(args)
        return func(*args, **(kwargs or {}))
