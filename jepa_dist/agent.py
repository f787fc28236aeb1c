"""torchrun, except that it ends with what happened to the ranks, not with a traceback of its own.

Called by launch/multinode.sh on every host, and for each run of a sweep; takes torchrun's
arguments: ``python -m jepa_dist.agent --nproc-per-node=2 -m jepa_dist.train ...``. Exit code
128 + n after signal n (the ranks have had their time to save by then), 1 if ranks failed.
"""

from __future__ import annotations

import os
import signal
import sys

# When the agent that keeps the rendezvous ends first, torch's C++ tells the others so with a stack
# trace for each connection. Read when torch is imported; the ranks keep what the user has set.
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


def main() -> int:
    """Run torchrun; returns the exit code."""
    wanted = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = wanted or "ERROR"
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if wanted is None:
        del os.environ[_LOG_LEVEL]
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        print(f"{host}: the ranks were stopped ({name})", file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
