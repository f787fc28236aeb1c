"""Document starts in the rows of a global batch, for spans that do not cross documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jepa_dist.data.loader import TokenDataset

Starts = npt.NDArray[np.bool_]


class DocumentStarts:
    """The document starts of each step's global batch.

    Args:
        dataset: The samples.
        bos_id: Id that begins every document.
        sequences: Rows of a global batch.
        seed: Seed of the order of samples.
        step: Optimizer step that ``samples_consumed`` refers to.
        samples_consumed: Samples that the run has consumed before that step.
        skip: Places in the order that the run skips.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        bos_id: int,
        *,
        sequences: int,
        seed: int,
        step: int,
        samples_consumed: int,
        skip: range,
    ) -> None:
        self._dataset, self._bos_id = dataset, bos_id
        self._sequences, self._seed, self._skip = sequences, seed, skip
        self._offset = samples_consumed - step * sequences

    def read(self, step: int) -> Starts:
        """Return whether each position of the step's rows begins a document, bool [rows, seq_len].

        Raises:
            UserError: a damaged shard.
        """
        first = self._offset + step * self._sequences
        ids = self._dataset.order.ids(first, self._sequences, self._seed, self._skip)
        starts: Starts = self._dataset.read(ids)[:, :-1] == self._bos_id
        return starts
