"""Tables as images, for TensorBoard's ``add_image(tag, image, step, dataformats="HWC")``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_CELL = 24  # pixels
_NEGATIVE, _ZERO, _POSITIVE = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_UNKNOWN = (128, 128, 128)


def cos_image(table: Sequence[Sequence[float]]) -> npt.NDArray[np.uint8]:
    """Return a table of cosines (``jepa/cos_table``'s "cos") as an image, [H, W, 3].

    One square per cell: blue -1, white 0, red +1, gray not finite. The first row (the shortest
    spans) is at the top.
    """
    cosines = np.asarray(table, dtype=np.float64)
    share = np.clip(np.abs(np.nan_to_num(cosines)), 0, 1)[..., None]
    end = np.where(cosines[..., None] < 0, _NEGATIVE, _POSITIVE)
    colors = (1 - share) * np.array(_ZERO) + share * end
    colors = np.where(np.isfinite(cosines)[..., None], colors, _UNKNOWN)
    pixels: npt.NDArray[np.uint8] = colors.round().astype(np.uint8)
    return pixels.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
