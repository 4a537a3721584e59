"""A stage of your own, in a file of your own: pretraining with the focal loss (arXiv 1708.02002, eq. 4).

    torchrun --nproc-per-node 2 launch/pretrain.py CONFIG.yaml stage=examples.own_stage.focal:Focal stage_options.gamma=2

It says what a token costs; data, layouts, schedules, checkpoints and logs are the engine's.
"""

from engine.data import text
from engine.stage import Loss, Stage


class Focal(Stage):
    def configure(self, run):
        self.gamma = float(run.stage_options.get("gamma", 2.0))
        if self.gamma < 0:
            raise ValueError(f"stage_options.gamma={self.gamma} rewards what is known already; give 0 or more")
        return run

    def datasets(self, run, num_train, num_valid):
        return text.datasets(run, num_train, num_valid)

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def loss(self, role, output, batch):
        nll = -output * batch["loss_mask"]                     # output: log p(label) [b, s]
        focal = (1 - output.exp()) ** self.gamma * nll         # sure tokens count less
        return Loss(sum=focal.sum(), metrics={"nll": (nll.sum(), batch["loss_mask"].sum())})
