"""torchrun that reports failed ranks without printing its own traceback.

Called by launch/multinode.sh on every host, and for each run of a sweep; takes torchrun's
arguments: ``python -m jepa_dist.process.agent --nproc-per-node=2 -m jepa_dist.train ...``. Exit
code 128 + n after signal n (once the ranks have had time to save), 1 if ranks failed.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

from jepa_dist.process.garbage import collection_paused

# When the agent that hosts the rendezvous store exits first, torch's C++ code prints a stack trace
# for each connection on the other hosts. The variable is read when torch is imported; the ranks
# inherit the user's value.
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


def main() -> int:
    """Run torchrun; returns the exit code."""
    wanted = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = wanted or "ERROR"
    with collection_paused():
        from torch.distributed import run

    if wanted is None:
        del os.environ[_LOG_LEVEL]
    try:
        run.main()
    except Exception as error:
        code = report(error)
        if code is None:
            raise
        return code
    return 0


def report(error: BaseException) -> int | None:
    """Print an error by which torchrun ends as usual; return the exit code, None for others."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if isinstance(error, ChildFailedError | RendezvousError):
        print(error, file=sys.stderr)
        return 1
    if isinstance(error, SignalException):
        name = signal.Signals(error.sigval).name
        host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        print(f"{host}: the ranks were stopped ({name})", file=sys.stderr)
        return 128 + error.sigval
    return None


def print_without_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an uncaught error, as ``sys.excepthook`` of a torchrun that this package extends."""
    if report(error) is None:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.exit(main())
