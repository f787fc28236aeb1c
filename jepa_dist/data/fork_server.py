"""What the fork server of the data loader imports, so that each of its processes has it already.

The imports are frozen: else the first garbage collection of each process would visit, and so copy,
all of them (39 MiB and 0.3 seconds).
"""

from jepa_dist.process.garbage import collection_paused

with collection_paused():
    import jepa_dist.data.loader  # noqa: F401
