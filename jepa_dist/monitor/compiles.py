"""Count compiled graphs, and distinguish recompiles from first compiles."""

from __future__ import annotations


class CompileCounter:
    """Counter of recompiles.

    The first step that trains, evaluates or uses JEPA compiles the graphs of that kind of work; a
    graph compiled at any other time is a recompile, which should never happen
    ("Compile regions" in docs/architecture.md).
    """

    def __init__(self) -> None:
        self._graphs = 0
        self._seen: set[str] = set()
        self.recompiles = 0

    def observe(self, graphs: int, kinds: set[str]) -> None:
        """Record the total number of graphs after a step that did these kinds of work."""
        if kinds <= self._seen:
            self.recompiles += graphs - self._graphs
        self._seen |= kinds
        self._graphs = graphs
