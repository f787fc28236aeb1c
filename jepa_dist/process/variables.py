"""Defaults of environment variables that a training process needs.

They are read when CUDA and the compiler are initialized. The commands set them, rather than this
project's launch scripts, so that they apply under plain torchrun too.
"""

from __future__ import annotations

import os

# The second is the older name, which torch still reads.
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
# Inductor's own upper limit.
_MOST_COMPILE_THREADS = 32


def set_defaults(ranks_on_host: int) -> None:
    """Set allocator and compiler variables that the user has not set; call before CUDA is used.

    * Expandable segments in CUDA's allocator: less fragmentation when phases, JEPA and evaluation
      change tensor sizes.
    * Inductor's compile processes: the host's cores divided by its ranks. By default every rank
      would start one per core, up to 32.

    Args:
        ranks_on_host: Number of ranks on this host.
    """
    if _OLD_ALLOCATOR not in os.environ:
        os.environ.setdefault(_ALLOCATOR, "expandable_segments:True")
    threads = len(os.sched_getaffinity(0)) // ranks_on_host
    threads = max(1, min(_MOST_COMPILE_THREADS, threads))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
