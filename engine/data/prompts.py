"""Batches of prompts that a model is to answer, and the records that say what an answer is worth.

    train, valid = datasets(run, num_train, num_valid)     # files of prompts, as data.train and data.valid name them
    batch = train.batch(sample_numbers)                    # tokens [b, p], right-padded, with their lengths
    train.record(number), train.text(number)               # the line of a sample, and its prompt as the model reads it

A dataset has no end: stages may draw more prompts than the steps of a run say. They are shuffled anew in every epoch, the same in every
layout. Left out: the files (prompt_files.py), and drawing answers (engine/mcore/generate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.data.blend import parse_blend
from engine.data.pack import Order
from engine.data.prompt_files import Source, decoder, longest_prompt, prompts, stop_tokens  # noqa: F401 (stop_tokens: for stages)
from engine.stage import Batch

ENDLESS = 1 << 62


class Prompts:
    """A dataset of `engine.stage.Dataset` over the prompts of one or more sources.

    number: 0 for the training set, 1, 2, ... for validation sets. make_order(n) -> Order of at least n samples.
    """

    rows_per_sample = 1

    def __init__(self, sources: Sequence[Source], number: int, limit: int, decode: Callable, make_order: Callable[[int], Order],
                 num_samples: int) -> None:
        self.sources, self.number, self.limit = list(sources), number, limit
        self._decode, self._make_order, self._order = decode, make_order, make_order(num_samples)

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens int64 [b, p], zeros behind the prompt; lengths, number (of the sample) and dataset (this one's number) int64 [b]."""
        ids = [self._ids(*where) for where in self._where(sample_numbers)]
        tokens = np.zeros((len(ids), self.limit), np.int64)
        for row, prompt in zip(tokens, ids):
            row[:prompt.size] = prompt
        return {"tokens": torch.from_numpy(tokens), "lengths": torch.tensor([prompt.size for prompt in ids]),
                "number": torch.tensor(np.asarray(sample_numbers), dtype=torch.int64), "dataset": torch.full((len(ids),), self.number)}

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Tokens of the longest of these prompts."""
        return max(int(self.sources[source].tokens.sequence_lengths[i]) for source, i in self._where(sample_numbers))

    def record(self, number: int) -> dict:
        """The line of a sample."""
        (source, i), = self._where([number])
        return self.sources[source].record(i)

    def text(self, number: int) -> str:
        """The prompt of a sample as its tokens say it."""
        (source, i), = self._where([number])
        return self._decode(self._ids(source, i).tolist())

    def _ids(self, source: int, i: int) -> np.ndarray:
        return self.sources[source].tokens.get(i)

    def _where(self, sample_numbers) -> list[tuple[int, int]]:
        """(source, prompt) of each sample; the order of what was planned does not change when it is made longer."""
        wanted, order = int(np.max(sample_numbers)) + 1, self._order      # one order throughout: the prefetching thread asks too
        if wanted > len(order):
            order = self._order = self._make_order(wanted)
        return order.where(sample_numbers)


def datasets(run, num_train: int, num_valid: int) -> tuple[Prompts, dict[str, Prompts]]:
    """The training set and the validation sets, as run.data, run.chat, run.rollout and run.rewards say.

    data.train is a list of files, which become one source, or WEIGHT FILE WEIGHT FILE ..., a source each. data.one_epoch refuses more
    samples than one epoch holds, planned or drawn. Raises DataError, ConfigError.
    """
    train = _dataset(run, "data.train", run.data.train, 0, num_train, run.data.one_epoch)
    valid = {name: _dataset(run, f"data.valid.{name}", files, number, num_valid, False)
             for number, (name, files) in enumerate(run.data.valid.items(), start=1)} if num_valid else {}
    return train, valid


def _dataset(run, name: str, files: Sequence[str], number: int, num_samples: int, one_epoch: bool) -> Prompts:
    paths, weights = parse_blend(files)
    groups = [paths] if weights is None else [[path] for path in paths]
    sources = [prompts(run, group) for group in groups]
    names = [f"{name} ({', '.join(group)})" for group in groups]

    def make_order(wanted: int) -> Order:
        size = wanted if one_epoch else 2 * wanted      # beyond the plan: seldom anew
        return Order([len(source) for source in sources], weights, size, run.run.seed, one_epoch, names)

    return Prompts(sources, number, longest_prompt(run), decoder(run), make_order, num_samples)
