"""Batches of preferences: pairs of answers as neighbouring rows, or for kto single answers beside mismatched ones.

    train, valid = datasets(run, num_train, num_valid)     # files of preferences, as data.train and data.valid name them
    batch = train.batch(sample_numbers)                    # a sample is a pair: tensors [2b, seq_len], rows 2i chosen, 2i + 1 rejected

An answer of n tokens takes n places, its last token too, because a reward is read there. Padding is on the right, where causal
attention never looks. Pairs (kto: answers) are shuffled anew in every epoch, the same in every layout.
kto compares with mismatched pairs, the prompt of one sample with the answer of the one before it; the first sample of
train.global_batch takes the answer of the last, as TRL does within a micro-batch. Here it does not depend on the layout.
Left out: packing several answers into one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.data.blend import parse_blend
from engine.data.indexed import DataError
from engine.data.pack import Order
from engine.data.preference import Preferences, preferences
from engine.stage import Batch

NEEDS = {"margin": 'a "margin" (or chosen_score and rejected_score)', "scores": "chosen_score and rejected_score"}


class Pairs:
    """A dataset of `engine.stage.Dataset` over the pairs of one or more sources.

    references: per source float32 [rows], the stored reference log-probability of every answer, or None.
    """

    rows_per_sample = 2

    def __init__(self, sources: Sequence[Preferences], order: Order, seq_len: int, margins: Sequence[np.ndarray]) -> None:
        self.sources, self.order, self.seq_len, self.margins = list(sources), order, seq_len, list(margins)
        self.references: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens, labels, position_ids int64 [2b, s]; loss_mask float32 [2b, s], 1 where the label counts; ends int64 [2b], the place of
        the last token; margins float32 [2b], equal in both rows; row int64 [2b]; with references also reference_logps float32 [2b]."""
        where = self.order.where(sample_numbers)
        rows = [(source, 2 * pair + k) for source, pair in where for k in (0, 1)]
        batch = filled([_sequence(self.sources[source], row) for source, row in rows], self.seq_len)
        batch["margins"] = torch.tensor([self.margins[source][pair] for source, pair in where], dtype=torch.float32).repeat_interleave(2)
        # A number for every row that a run reads: noise of the embedding is drawn from it.
        batch["row"] = torch.tensor(np.asarray(sample_numbers)[:, None] * 2 + [0, 1], dtype=torch.int64).flatten()
        if self.references is not None:
            batch["reference_logps"] = torch.tensor([self.references[source][row] for source, row in rows], dtype=torch.float32)
        return batch

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Tokens of the longest answer, its prompt included, of these pairs."""
        return max(int(self.sources[source].tokens.sequence_lengths[2 * pair + k])
                   for source, pair in self.order.where(sample_numbers) for k in (0, 1))


class _Stored:
    """The order of the cache, from its beginning again at its end."""

    def __init__(self, size: int, num_samples: int) -> None:
        self.size, self.num_samples = size, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def where(self, sample_numbers: np.ndarray) -> list[tuple[int, int]]:
        return [(0, number % self.size) for number in np.asarray(sample_numbers).tolist()]


def in_order(source: Preferences, seq_len: int, num_samples: int) -> Pairs:
    """The pairs of one source as they are stored: sample i is pair i, modulo their number."""
    size = len(source.tokens) // 2
    return Pairs([source], _Stored(size, num_samples), seq_len, [np.zeros(size)])


class Answers:
    """A dataset of `engine.stage.Dataset` over single answers with labels (kto). block: samples among which answers are exchanged."""

    rows_per_sample = 1

    def __init__(self, sources: Sequence[Preferences], order: Order, seq_len: int, block: int) -> None:
        self.sources, self.order, self.seq_len, self.block = list(sources), order, seq_len, block

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """As Pairs.batch with one row per sample and no margins; is_desirable bool [b]; kl_tokens, kl_labels, kl_loss_mask [b, s]: the
        prompt with another sample's answer."""
        where = self.order.where(sample_numbers)
        batch = filled([_sequence(self.sources[source], row) for source, row in where], self.seq_len)
        mismatched = filled(self._mismatched(sample_numbers), self.seq_len)
        return {**batch, **{f"kl_{name}": mismatched[name] for name in ("tokens", "labels", "loss_mask")},
                "is_desirable": torch.tensor([bool(self.sources[source].is_desirable[row]) for source, row in where]),
                "row": torch.tensor(sample_numbers, dtype=torch.int64)}

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Tokens of the longest of these answers, and of the mismatched ones, their prompts included."""
        lengths = [int(self.sources[source].tokens.sequence_lengths[row]) for source, row in self.order.where(sample_numbers)]
        return max(lengths + [ids.size for ids, _ in self._mismatched(sample_numbers)])

    def _mismatched(self, sample_numbers: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each sample's prompt with the answer of the sample before it in its block, cut to seq_len."""
        numbers = np.asarray(sample_numbers)
        start = numbers // self.block * self.block
        partners = start + (numbers - start - 1) % np.minimum(self.block, len(self) - start)
        found = []
        for own, other in zip(self.order.where(numbers), self.order.where(partners)):
            (ids, mask), (other_ids, other_mask) = (_sequence(self.sources[source], row) for source, row in (own, other))
            p, q = (self.sources[source].prompts[row] for source, row in (own, other))
            found.append(tuple(np.concatenate(parts)[:self.seq_len] for parts in ((ids[:p], other_ids[q:]), (mask[:p], other_mask[q:]))))
        return found


def datasets(run, num_train: int, num_valid: int, paired: bool = True, needs: str = "") -> tuple[Pairs | Answers, dict[str, Pairs | Answers]]:
    """The training set of num_train samples and the validation sets of num_valid each, as run.data and run.chat say.

    data.train is a list of files, which become one source, or WEIGHT FILE WEIGHT FILE ..., a source each. paired: False reads single
    answers. needs: margin or scores, which every pair must then say. Raises DataError.
    """
    train = _dataset(run, "data.train", run.data.train, num_train, run.data.one_epoch, paired, needs)
    valid = {name: _dataset(run, f"data.valid.{name}", files, num_valid, False, paired, needs)
             for name, files in run.data.valid.items()} if num_valid else {}
    return train, valid


def _dataset(run, name: str, files: Sequence[str], num_samples: int, one_epoch: bool, paired: bool, needs: str) -> Pairs | Answers:
    paths, weights = parse_blend(files)
    groups = [paths] if weights is None else [[path] for path in paths]
    sources = [preferences(run, group, paired) for group in groups]
    sizes = [len(source.tokens) // (2 if paired else 1) for source in sources]
    order = Order(sizes, weights, num_samples, run.run.seed, one_epoch, [f"{name} ({', '.join(group)})" for group in groups])
    if not paired:
        return Answers(sources, order, run.train.seq_len, run.train.global_batch)
    return Pairs(sources, order, run.train.seq_len, [_margins(source, needs) for source in sources])


def _margins(source: Preferences, needs: str) -> np.ndarray:
    """One number per pair, float32 [pairs]; 0 where none is needed and none is given. Raises DataError."""
    margin, scores = source.margins.T
    found = scores if needs == "scores" else np.where(np.isnan(margin), scores, margin)
    if needs and (missing := np.isnan(found)).any():
        raise DataError(f"{', '.join(source.report.files)}: {missing.sum()} of {found.size} pairs do not say {NEEDS[needs]}, which this run compares "
                        "with; add it, or choose a loss without it")
    return np.nan_to_num(found)


def _sequence(source: Preferences, row: int) -> tuple[np.ndarray, np.ndarray]:
    return source.tokens.get(row), source.masks.get(row)


def filled(sequences: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Batch:
    """(ids, mask of the tokens that count) of each row -> padded tensors; the mask moves to the label's place."""
    shape = len(sequences), seq_len
    tokens, labels, loss_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for k, (ids, mask) in enumerate(sequences):
        n = ids.size
        tokens[k, :n], labels[k, :n - 1], loss_mask[k, :n - 1] = ids, ids[1:], mask[1:]
    return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels), "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.arange(seq_len).repeat(len(sequences), 1), "ends": torch.tensor([ids.size - 1 for ids, _ in sequences])}
