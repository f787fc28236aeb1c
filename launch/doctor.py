"""``jepa_dist doctor`` as a script, for launchers that take only a script's path: docs/slurm.md."""

from __future__ import annotations

import sys

from jepa_dist.doctor.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
