"""Who holds which rows of the global batch (contract C1).

A rank holds a contiguous slice, cut into micro-batches. Every rank runs the same number of
micro-batches of the same shape, because collectives and compiled graphs need that; where the
rows do not divide, micro-batches are filled up with padding rows of weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """One rank's share of a global batch of ``sequences`` rows.

    ``micro`` is the most rows a micro-batch may have.
    """

    sequences: int
    micro: int
    rank: int
    world_size: int

    @property
    def rows(self) -> range:
        """The rank's rows, as places in the global batch."""
        return range(
            self.sequences * self.rank // self.world_size,
            self.sequences * (self.rank + 1) // self.world_size,
        )

    @property
    def num_micro(self) -> int:
        """Micro-batches per step, the same on every rank."""
        return -(-self._most_rows // self.micro)

    @property
    def micro_size(self) -> int:
        """Rows of every micro-batch, padding included, the same on every rank."""
        return -(-self._most_rows // self.num_micro)

    def micro_rows(self, index: int) -> range:
        """Real rows of micro-batch ``index``, as places in the global batch; may be empty."""
        return self.rows[index * self.micro_size : (index + 1) * self.micro_size]

    @property
    def _most_rows(self) -> int:
        """Rows of the rank that has most."""
        return -(-self.sequences // self.world_size)
