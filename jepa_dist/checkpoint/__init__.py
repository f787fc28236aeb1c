"""Atomic, verified checkpoints, for exact resume: docs/checkpointing.md.

``python -m jepa_dist.checkpoint`` lists, verifies, compares, exports and prunes them.
"""

from jepa_dist.checkpoint.folder import published, set_aside_after
from jepa_dist.checkpoint.loading import Found, find_resumable, load
from jepa_dist.checkpoint.manifest import verify
from jepa_dist.checkpoint.retention import RetentionPolicy
from jepa_dist.checkpoint.saver import Checkpointer, SaveReport

__all__ = [
    "Checkpointer",
    "Found",
    "RetentionPolicy",
    "SaveReport",
    "find_resumable",
    "load",
    "published",
    "set_aside_after",
    "verify",
]
