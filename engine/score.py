"""Score conversations with a checkpoint: a reward model's reward of each, or a language model's log-probability of what is said.

    score_file(run, "chat.jsonl", "scored.jsonl")       # on every rank; run: the checkpoint's own, with this layout

Each line of the input comes out as it was with one key more: `reward`, the value at the end of the last turn that is trained, or `logp`, the
sum of log p over what the assistant says (`logp_tokens`: how many tokens that is). Lines keep their order.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from data_tools.reader import read_chunks
from engine import losses
from engine.config import ConfigError
from engine.data.conversations import Conversations, conversations
from engine.data.indexed import DataError
from engine.data.pairs import filled
from engine.mcore import topology
from engine.stage import Role, Stage
from engine.train import Trainer


class Scoring(Stage):
    """A stage that trains nothing: one frozen network with the checkpoint's head."""

    def __init__(self, head: str):
        self.roles = {"policy": Role(head=head, train=False)}


class InOrder:
    """The conversations of a file, one a row that ends with the last token that is trained; numbers beyond the end come around again."""

    rows_per_sample = 1

    def __init__(self, found: Conversations, seq_len: int, num_samples: int):
        self.found, self.seq_len, self.num_samples = found, seq_len, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def batch(self, sample_numbers):
        """As engine/data/pairs.py's: `ends` int64 [b] is the place of the last token."""
        return filled([self._sequence(number) for number in sample_numbers], self.seq_len)

    def longest(self, sample_numbers) -> int:
        return max(self._sequence(number)[0].size for number in sample_numbers)

    def _sequence(self, number):
        row = int(number) % len(self.found.tokens)
        mask = self.found.masks.get(row)
        end = int(np.flatnonzero(mask)[-1]) + 1
        return self.found.tokens.get(row)[:end], mask[:end]


def score_file(run, source: str, target: str) -> int:
    """Write `target`, the lines of `source` with their scores. Collective. Returns their number.

    run: a RunConfig whose checkpoint.load is the model, with the tokenizer, template and layout to use.
    Raises DataError for conversations that cannot be scored, CheckpointError and ConfigError for a checkpoint that cannot be used.
    """
    if Path(target).exists():
        raise ConfigError([f"{target} exists already; name another file or remove it"])
    stage = Scoring(run.model.head)
    place = topology.start(run)
    shorter = run.train.model_copy(update={"seq_len": run.train.seq_len - 1})  # a row holds every token, where training needs all but one
    found = conversations(run.model_copy(update={"train": shorter}), [source])
    if found.report.kept != found.report.conversations:
        raise DataError(f"{source}: {found.report.conversations - found.report.kept} conversations have nothing to score; leave them out")
    trainer = Trainer(run, stage, place)
    scores = _scores(trainer, trainer.frozen(), found)
    if place.rank == 0:
        _write(source, target, scores)
    return len(found.tokens)


def _scores(trainer, model, conversations: Conversations) -> dict[str, list[float]]:
    """Key of a line -> one number per conversation, on every rank."""
    run, place, total = trainer.run, trainer.place, len(conversations.tokens)
    size = run.train.micro_batch * place.dp * place.pp  # enough micro-batches to fill the pipeline
    loader = trainer.loader(InOrder(conversations, run.train.seq_len, -(-total // size) * size))
    found = torch.zeros(3, total, dtype=torch.float64)  # [value, tokens, how often scored]
    for first in range(0, len(loader.dataset), size):
        numbers = loader.sample_numbers(first, size) % total
        batches = loader.batches(first, size)
        for of, batch, output in zip(numbers, batches, model.score(batches)):
            output = output.cpu()
            mask = batch["loss_mask"]
            value = losses.rewards(output, batch["ends"]) if model.run.model.head == "scalar" else losses.sequence_logps(output, mask)
            found[:, torch.from_numpy(of)] = torch.stack([value, mask.sum(1), torch.ones(len(of))]).double()
    value, tokens, times = model.total(found).cpu()
    if model.run.model.head == "scalar":
        return {"reward": (value / times).tolist()}
    return {"logp": (value / times).tolist(), "logp_tokens": (tokens / times).tolist()}


def _write(source: str, target: str, scores: dict[str, list[float]]) -> None:
    """The target appears when it is whole."""
    temporary = Path(f"{target}.tmp{os.getpid()}")
    rows = zip(*scores.values())
    with open(temporary, "w", encoding="utf-8") as out:
        for chunk in read_chunks([source]):
            for line in chunk.lines:
                out.write(json.dumps({**json.loads(line), **dict(zip(scores, next(rows)))}, ensure_ascii=False) + "\n")
    os.replace(temporary, target)
