"""Supervised fine-tuning: predict what the assistant says in conversations, packed into rows.

A batch is rows of tokens and labels [b, s]; loss_mask is 1 where the label belongs to a turn of the assistant, its end token included.
The loss is the sum of -log p(label) over those; the engine divides it by their number in the global batch.
Left out: the conversations themselves (engine/data/conversations.py) and their rows (engine/data/pack.py).
"""

from engine.data import conversations, pack
from engine.stage import Loss, Stage


class Sft(Stage):
    def configure(self, run):
        return conversations.configured(run)

    def datasets(self, run, num_train, num_valid):
        return pack.datasets(run, num_train, num_valid)

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def loss(self, role, output, batch):
        nll = -(output * batch["loss_mask"]).sum()  # output: log p(label) [b, s]
        return Loss(sum=nll)
