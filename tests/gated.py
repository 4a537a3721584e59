"""Pretraining that a test can hold at a step, so that a fault meets it there; a stage by its path: stage=tests.gated:Gated.

While the file HOLDS/hold_7_1 is there, rank 1 waits at the beginning of step 7, and says so by HOLDS/at_7_1. HOLDS is stage_options.holds.
"""

import os
import time
from pathlib import Path

from engine.stages.pretrain import Pretrain


class Gated(Pretrain):
    def configure(self, run):
        self.holds = Path(run.stage_options["holds"])
        return run

    def draw(self, feed, models):
        at = f"{feed.step}_{os.environ['RANK']}"
        hold = self.holds / f"hold_{at}"
        if hold.exists():
            (self.holds / f"at_{at}").touch()
        while hold.exists():
            time.sleep(0.01)
        return super().draw(feed, models)
