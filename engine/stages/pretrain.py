"""Pretraining: predict every next token of a corpus.

A sample is seq_len + 1 neighbouring tokens of the shuffled corpus; tokens are the first seq_len, labels the last.
The loss is the sum of -log p(label) over unmasked tokens; the engine divides it by their number in the global batch.
Where batches say which corpus a row is of (data.valid_by_source, data.train_by_source), source_loss/PREFIX is that corpus's part of it.
"""

import torch

from engine.data import text
from engine.stage import Loss, Stage


class Pretrain(Stage):
    datasets_stay_with_reader = True
    reads_text_everywhere = False
    source_names: list[str] = []

    def begin(self, run, trainer, datasets):
        self.source_names = next((dataset.source_names for dataset in datasets if getattr(dataset, "source_names", [])), [])

    def datasets(self, run, num_train, num_valid):
        return text.datasets(run, num_train, num_valid)

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def proportions(self, role, batch):
        return batch["loss_mask"]

    def loss(self, role, output, batch):
        nll = -(output * batch["loss_mask"]).sum()  # output: log p(label) [b, s]
        return Loss(sum=nll, metrics=self._by_source(output, batch) if "source" in batch else {})

    def _by_source(self, output, batch):
        """source_loss/PREFIX -> (sum of -log p(label), number of tokens) of the rows of that corpus."""
        sums = torch.zeros(2, len(self.source_names), device=output.device)
        rows = torch.stack([-(output.detach() * batch["loss_mask"]).sum(1), batch["loss_mask"].sum(1)])  # [2, b]
        totals, counts = sums.index_add(1, batch["source"], rows).unbind()
        return {f"source_loss/{name}": (totals[k], counts[k]) for k, name in enumerate(self.source_names)}
