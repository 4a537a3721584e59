"""Pretraining: predict every next token of a corpus.

A sample is seq_len + 1 neighbouring tokens of the shuffled corpus; tokens are the first seq_len, labels the last.
The loss is the sum of -log p(label) over unmasked tokens; the engine divides it by their number in the global batch.
"""

from engine.data import text
from engine.stage import Loss, Stage


class Pretrain(Stage):
    datasets_stay_with_reader = True
    reads_text_everywhere = False

    def datasets(self, run, num_train, num_valid):
        return text.datasets(run, num_train, num_valid)

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def loss(self, role, output, batch):
        nll = -(output * batch["loss_mask"]).sum()  # output: log p(label) [b, s]
        return Loss(sum=nll)
