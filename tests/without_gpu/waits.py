"""Detect where the host would wait for the device, on tensors without data.

``pretend_streams`` replaces streams, events and page-locked memory by ones that report waits;
``WaitDetector`` sees operators that hand values to the host, and copies that are not asynchronous.
``python -m tests.without_gpu.waits OUT`` tries both on waits that are known (``KNOWN_WAITS``).
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.without_gpu import pretend

_PROJECT = Path(__file__).parent.parent.parent / "jepa_dist"
_ACTIVE: list[WaitDetector] = []


class WaitDetector(TorchDispatchMode):
    """Records the waits of the host while it is active, as "what, file:line"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0
        """How many were called, for the host's work."""

    def __enter__(self) -> Any:
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check copies; reading a value on the device fails, because it does not exist."""
        kwargs = kwargs or {}
        self.operators += 1
        if func.name() == "aten::copy_":
            self._look_at_copy(args[1], args[0], args[2:] == (True,) or kwargs.get("non_blocking"))
        if func.name() == "aten::_to_copy" and kwargs.get("device") is not None:
            self._look_at_copy(args[0], kwargs["device"], kwargs.get("non_blocking"))
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note(f"value of a tensor: {func.name()}")
            raise

    def note(self, what: str) -> None:
        """Record a wait with the line of this project that caused it."""
        frames = reversed(traceback.extract_stack())
        frame = next((f for f in frames if _is_training_code(Path(f.filename))), None)
        place = "elsewhere"
        if frame is not None:
            place = f"{Path(frame.filename).relative_to(_PROJECT.parent)}:{frame.lineno}"
        self.found.append(f"{what}, {place}")

    def _look_at_copy(self, source: Tensor, target: Any, non_blocking: Any) -> None:
        device = target.device if isinstance(target, Tensor) else torch.device(target)
        kinds = (source.device.type, device.type)
        if kinds[0] == kinds[1] or "cuda" not in kinds:
            return
        arrow, size = " -> ".join(kinds), source.numel()
        # A non-blocking copy to new host memory uses page-locked memory.
        host = source if kinds[0] == "cpu" else target
        if not non_blocking:
            self.note(f"blocking copy {arrow} of {size} elements")
        elif isinstance(host, Tensor) and not getattr(host, "is_page_locked", False):
            self.note(f"copy {arrow} of {size} elements without page-locked memory")


def _is_training_code(path: Path) -> bool:
    """Return whether a frame is the trainer's, not a dispatch mode of the benchmarks."""
    return path.is_relative_to(_PROJECT) and not path.is_relative_to(_PROJECT / "bench")


def _report(what: str) -> None:
    for detector in _ACTIVE:
        detector.note(what)


# ---------------------------------------------------------------------------- streams and events


class Event:
    """An event that never completes, as if the device were always busy."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Do nothing."""

    wait = record

    def query(self) -> bool:
        """Return False: not completed."""
        return False

    def synchronize(self) -> None:
        """Report a wait of the host."""
        _report("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Report a wait: both events must have completed."""
        _report("event.elapsed_time")
        return 1.0


class Stream:
    """A stream that executes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: the stream waits, not the host."""

    wait_event = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event of this stream."""
        return event or Event()

    def synchronize(self) -> None:
        """Report a wait of the host."""
        _report("stream.synchronize")

    def query(self) -> bool:
        """Return False: still busy."""
        return False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def pretend_streams() -> None:
    """Replace PyTorch's streams, events and page-locked memory."""
    any_torch: Any = torch
    cuda = any_torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = any_torch.accelerator.current_stream = lambda *_: Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    any_torch.accelerator.is_available = lambda: True  # the loader asks, before it locks pages
    cuda.synchronize = lambda *_: _report("cuda.synchronize")
    any_torch.Tensor.pin_memory = lambda tensor, *_: _page_locked(tensor)
    torch.utils._device._device_constructors()  # `with torch.device` knows functions by identity
    empty = torch.empty

    def empty_or_page_locked(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return _page_locked(tensor) if pin_memory else tensor

    any_torch.empty = empty_or_page_locked


def _page_locked(tensor: Tensor) -> Tensor:
    tensor.is_page_locked = True  # type: ignore[attr-defined]
    return tensor


# ---------------------------------------------------------------------------- known waits

KNOWN_WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.empty(8).copy_(x),
    "copy to the host, not page-locked": lambda x: torch.empty(8).copy_(x, non_blocking=True),
    "copy to the device": lambda x: torch.ones(8).to(x.device),
    "copy to the device, not page-locked": lambda x: torch.ones(8).to(x.device, non_blocking=True),
    "new tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "device": lambda x: torch.cuda.synchronize(),
}
NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: (x + 1).sum(),
    "zeros": lambda x: torch.zeros(8, device=x.device),
    "copy to the host": lambda x: torch.empty(8, pin_memory=True).copy_(x, non_blocking=True),
    "copy to new memory": lambda x: x.to("cpu", non_blocking=True),
    "copy to the device": lambda x: torch.ones(8).pin_memory().to(x.device, non_blocking=True),
    "event": lambda x: torch.cuda.Event().record(),
}


def _try(action: Callable[[Tensor], object]) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.ones(8, device=pretend.DEVICE)
        with (
            WaitDetector() as detector,
            contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException),
        ):
            action(x)
    return detector.found


def main() -> None:
    """Write what is detected in known waits and in code that does not wait."""
    pretend.pretend_device()
    pretend_streams()
    found = {
        "waits": {name: _try(action) for name, action in KNOWN_WAITS.items()},
        "no waits": {name: _try(action) for name, action in NO_WAITS.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
