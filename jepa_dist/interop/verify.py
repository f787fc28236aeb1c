"""Compare the tensors of a file with those of a model: names, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Signature(NamedTuple):
    """Properties that a tensor must share with its parameter."""

    shape: tuple[int, ...]
    dtype: str


def mismatches(
    source: str, expected: Mapping[str, Signature], found: Mapping[str, Signature]
) -> list[str]:
    """Return a line per tensor that is missing, not in the model, or of another shape or dtype.

    Args:
        source: The file, for the messages.
        expected: The model's parameters, under the file's names.
        found: The file's tensors.
    """
    shared = [name for name in expected if name in found]
    return [
        *(f"{source}: {name}: missing" for name in expected if name not in found),
        *(f"{source}: {name}: not in this model" for name in found if name not in expected),
        *(
            f"{source}: {name}: shape {found[name].shape}, expected {expected[name].shape}"
            for name in shared
            if found[name].shape != expected[name].shape
        ),
        *(
            f"{source}: {name}: dtype {found[name].dtype}, expected {expected[name].dtype}"
            for name in shared
            if found[name].dtype != expected[name].dtype
        ),
    ]
