"""``jepa_dist doctor`` where only the path of a script can be given: docs/slurm.md."""

from __future__ import annotations

import sys

from jepa_dist.doctor.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
