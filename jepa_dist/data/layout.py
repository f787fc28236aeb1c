"""Distribution of the rows of the global batch over ranks (world-size invariance).

A rank has a contiguous slice, divided into micro-batches. Every rank runs the same number of
micro-batches of the same shape, because collectives and compiled graphs need that; if the
rows do not divide evenly, micro-batches are padded with rows of weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """One rank's share of a global batch of ``sequences`` rows.

    ``micro`` is the maximum number of rows of a micro-batch.
    """

    sequences: int
    micro: int
    rank: int
    world_size: int

    @property
    def rows(self) -> range:
        """The rank's rows, as indices in the global batch."""
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
        """Return the real rows of micro-batch ``index``, as global indices; may be empty."""
        return self.rows[index * self.micro_size : (index + 1) * self.micro_size]

    @property
    def _most_rows(self) -> int:
        """Number of rows of the rank with most rows."""
        return -(-self.sequences // self.world_size)
