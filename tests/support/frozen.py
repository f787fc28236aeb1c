"""Imported last by the fork server: its children's garbage collections skip what it has imported.

Otherwise the first collection of each child visits, and so copies, all of torch and the trainer.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
