"""Environment variables that a training process needs, set where the user has not.

They are read when CUDA and the compiler start. The commands set them themselves, so that they hold
under plain torchrun, too, and not only under this project's launchers.
"""

from __future__ import annotations

import os

# The older name, of which torch still takes note.
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
# Inductor starts this many at most, however many cores there are.
_MOST_COMPILE_THREADS = 32


def set_defaults(ranks_on_host: int) -> None:
    """Set allocator and compiler variables that are not set; call before CUDA is used.

    * CUDA's allocator grows its segments instead of adding new ones (less fragmentation when
      phases, JEPA and evaluation change the sizes).
    * Inductor's compile processes are shared out: by default every rank would start as many as the
      host has cores, up to 32.

    Args:
        ranks_on_host: Ranks that share this host's cores.
    """
    if _OLD_ALLOCATOR not in os.environ:
        os.environ.setdefault(_ALLOCATOR, "expandable_segments:True")
    threads = len(os.sched_getaffinity(0)) // ranks_on_host
    threads = max(1, min(_MOST_COMPILE_THREADS, threads))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
