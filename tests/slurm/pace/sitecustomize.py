"""Let each optimizer of a rank sleep after its step: a run that only has to last stays idle.

Python imports this module at its start when its folder is on the path.
"""

import os
import time

if "RANK" in os.environ:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def _sleep(*_: object) -> None:
        time.sleep(0.3)

    register_optimizer_step_post_hook(_sleep)
