"""Continued pretraining: go on with a trained model on other text, without forgetting the text before.

    stage: continued
    checkpoint: {load: runs/base, load_optimizer: false}
    data: {train: [1, law], replay: [0.7, web, 0.3, code], replay_share: 0.05}
    schedule: {warmup_steps: 200}

Starts at step 1 and at sample 0 of its own data; the learning rate warms up again over schedule.warmup_steps (arXiv 2308.04014).
data.replay_share of all samples come from data.replay, in every phase of the mixture (arXiv 2403.08763; engine/data/mixture.py).
checkpoint.load_optimizer keeps Adam's moments or drops them. Left out: everything that pretraining does as well.
"""

from engine.stages import loaded
from engine.stages.pretrain import Pretrain


class Continued(Pretrain):
    def configure(self, run):
        """Raises ConfigError without checkpoint.load."""
        loaded.required(run)
        return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"load_position": False})})
