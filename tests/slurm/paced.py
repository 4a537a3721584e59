"""Pretraining that takes its time in the first start of a job, so that its time limit or a test's signal finds it under way on any machine.

Sleeping changes nothing of what is computed. A job that Slurm has started again runs at full speed.
"""

import os
import time

from engine.stages.pretrain import Pretrain


class Paced(Pretrain):
    def prepare(self, micro_batches, models):
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ.get("PACE_SECONDS", 0)))
        yield from super().prepare(micro_batches, models)
