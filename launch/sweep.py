"""``jepa_dist sweep``, with paths relative to the root of this checkout: docs/sweeps.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jepa_dist.sweep.__main__ import main

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main())
