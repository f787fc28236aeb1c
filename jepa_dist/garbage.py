"""Python's garbage collector, run at chosen steps instead of whenever it sees fit.

An automatic collection stops one rank, at a moment of its own, and all others wait for it in the
next collective: with many ranks the pauses add up. Here all ranks collect at the same steps, and
what exists when the first step is done (modules, compiled graphs) is not looked at again.
"""

from __future__ import annotations

import gc


class ScheduledCollection:
    """Switches automatic collection off until closed.

    Args:
        every: Steps between collections; 0 leaves everything to Python.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._graphs = -1
        if every:
            gc.disable()

    def after_step(self, step: int, graphs: int) -> None:
        """Collect if it is time to.

        Args:
            step: The step that is done, the same on every rank.
            graphs: Compiled so far; what came with a new one is long-lived and set aside.
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
        """Leave it to Python again."""
        if self._every:
            gc.unfreeze()
            gc.enable()
