"""Python's garbage collector, run at fixed steps instead of automatically.

An automatic collection pauses one rank at an arbitrary moment while all others wait for it in the
next collective: with many ranks the pauses add up. Here all ranks collect at the same steps, and
objects that exist after the first step (modules, compiled graphs) are frozen, i.e. not scanned
again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Import modules without automatic collections: they would scan all modules again and again.

    What has been imported is frozen, because it stays until the process ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class ScheduledCollection:
    """Garbage collection every ``every`` steps; automatic collection is disabled until closed.

    If automatic collection was disabled before, e.g. by another instance, it stays disabled.

    Args:
        every: Steps between collections; 0 keeps Python's automatic collection.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._graphs = -1
        self._was_enabled = gc.isenabled()
        if every:
            gc.disable()

    def after_step(self, step: int, graphs: int) -> None:
        """Collect if this step is due.

        Args:
            step: The completed step, the same on every rank.
            graphs: Number of graphs compiled so far; after a new one, all live objects are
                frozen, since what compilation creates is long-lived.
        """
        if self._every == 0:
            return
        if graphs != self._graphs:
            self._graphs = graphs
            gc.collect()
            gc.freeze()
        elif (step + 1) % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Re-enable automatic collection, if it was enabled before."""
        if self._every and self._was_enabled:
            gc.unfreeze()
            gc.enable()
