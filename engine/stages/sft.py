"""Supervised fine-tuning: predict what the assistant says in conversations, packed into rows.

A batch is rows of tokens and labels [b, s]; loss_mask is 1 where the label belongs to a turn of the assistant, its end token included.
The loss is the sum of -log p(label) over those; the engine divides it by their number in the global batch.
chat.exact_match adds, at validation, the share of conversations that greedy decoding would say exactly, turn by turn after what came before.
Left out: the conversations themselves (engine/data/conversations.py) and their rows (engine/data/pack.py).
"""

import torch

from engine.data import conversations, pack
from engine.stage import Loss, Stage


class Sft(Stage):
    datasets_stay_with_reader = True

    def configure(self, run):
        self.asks_exact_match = run.chat.exact_match
        return conversations.configured(run)

    def datasets(self, run, num_train, num_valid):
        return pack.datasets(run, num_train, num_valid)

    def count(self, role, batch):
        return batch["loss_mask"].sum()

    def proportions(self, role, batch):
        return batch["loss_mask"]

    def loss(self, role, output, batch):
        nll = -(output * batch["loss_mask"]).sum()  # output: log p(label) [b, s]
        return Loss(sum=nll)

    def measure(self, micro_batches, models):
        if not self.asks_exact_match:
            return {}
        hits = models["policy"].greedy(micro_batches)
        pairs = [exact_matches(hit.cpu(), batch) for hit, batch in zip(hits, micro_batches)]
        return {"exact_match": tuple(torch.tensor(float(sum(column))) for column in zip(*pairs))}


def exact_matches(hits, batch) -> tuple[int, int]:
    """Conversations of a batch whose trained labels are all hits, and conversations with a trained label. hits: bool [b, s]."""
    is_trained = batch["loss_mask"] > 0
    segments = batch.get("segment_ids", torch.zeros_like(batch["tokens"])).long()
    conversation = segments + torch.arange(len(segments))[:, None] * (int(segments.max()) + 1)
    trained, missed = (conversation[places].unique() for places in (is_trained, is_trained & ~hits))
    return len(trained) - len(missed), len(trained)
