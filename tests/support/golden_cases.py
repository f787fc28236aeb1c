"""Golden cases, found by globbing, so that another set of the same kinds can replace them.

``JEPA_GOLDEN_DIR`` names the directory (default: tests/golden). A case is STEM.npz + STEM.json;
its kind is the part of the stem before the first underscore.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN_DIR = Path(os.environ.get("JEPA_GOLDEN_DIR", Path(__file__).parent.parent / "golden"))


@dataclass(frozen=True)
class Case:
    """One golden case: its JSON description and lazily loaded arrays."""

    stem: str

    @property
    def info(self) -> dict[str, Any]:
        """The JSON beside the arrays."""
        return json.loads((GOLDEN_DIR / f"{self.stem}.json").read_text())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by key (keys contain slashes)."""
        with np.load(GOLDEN_DIR / f"{self.stem}.npz", allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the numeric arrays whose key starts with ``prefix``, keyed by the rest."""
        return {
            key.removeprefix(prefix): torch.from_numpy(value.copy())
            for key, value in self.arrays().items()
            if key.startswith(prefix) and value.dtype.kind in "fiub"
        }


def cases(kind: str) -> list[Any]:
    """Return all cases of a kind as pytest parameters; raise if there are none."""
    if not any(GOLDEN_DIR.glob("*.npz")):
        raise RuntimeError(f"no golden cases in {GOLDEN_DIR} (JEPA_GOLDEN_DIR)")
    stems = sorted(path.stem for path in GOLDEN_DIR.glob(f"{kind}_*.npz"))
    return [pytest.param(Case(stem), id=stem) for stem in stems]
