"""Reward model: a network with one number per token learns to give the preferred of two answers the greater one.

Batches come from engine/data/pairs.py, pairs as adjacent rows [2n, s]. The reward of an answer is the value at its last
token, the one that ends the turn, so that it can be read where a sampled answer stops. The loss is Bradley-Terry's, averaged
over the pairs of the global batch. A checkpoint of this stage is a scorer: `rewards(model.score(...), ends)` of engine/losses.py.
Left out: regression on scores, and rewards per step of an answer.
"""

import torch

from engine import losses
from engine.data import conversations, pairs
from engine.stage import Loss, Role, Stage


class Reward(Stage):
    datasets_stay_with_reader = True
    roles = {"policy": Role(head="scalar")}
    rows_alike = 2

    def configure(self, run):
        """Sets the scalar head, and what conversations need."""
        self.options = run.reward
        run = conversations.configured(run)
        return run.model_copy(update={"model": run.model.model_copy(update={"head": "scalar"})})

    def datasets(self, run, num_train, num_valid):
        return pairs.datasets(run, num_train, num_valid, needs="margin" if run.reward.margin else "")

    def count(self, role, batch):
        """Pairs."""
        return torch.tensor(len(batch["ends"]) / 2, device=batch["ends"].device)

    def loss(self, role, output, batch):
        """output: a value per token [2n, s]."""
        r = losses.rewards(output, batch["ends"])  # [2n]
        r_c, r_r = losses.pairs(r)
        margin = batch["margins"][0::2] if self.options.margin else 0.0
        loss = losses.bradley_terry(r_c, r_r, margin, self.options.center)
        num_pairs = self.count(role, batch)
        r_c, r_r = r_c.detach(), r_r.detach()
        return Loss(sum=loss.sum(), metrics={
            "accuracy": ((r_c > r_r).float().sum(), num_pairs),
            "margin": ((r_c - r_r).sum(), num_pairs),
            "reward": ((r_c + r_r).sum(), 2 * num_pairs),
        })
