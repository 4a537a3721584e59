"""Rows of train.seq_len tokens out of conversations: several in a row, each seeing only itself, or one in a row.

    train, valid = datasets(run, num_train, num_valid)     # files of conversations, as data.train and data.valid name them
    batch = train.batch(sample_numbers)                    # tensors [b, seq_len]

A conversation of n tokens takes n - 1 places: its last token is a label only. So a row of several says, place by place, what the same
conversations say in rows of their own: positions start again at 0, and attention is bounded by segment_ids. Packing is best-fit
decreasing (csrc/pack.cpp) and the same in every epoch; the rows are shuffled anew in each.
Left out: conversations cut over two rows, and packing across files that have weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from engine import _csrc
from engine.data.blend import normalize, parse_blend
from engine.data.conversations import Conversations, conversations
from engine.data.indexed import DataError
from engine.data.pretraining import check_sample_numbers
from engine.stage import Batch

log = logging.getLogger(__name__)


class Order:
    """Which item of which source each sample is: epochs of each source in an order of their own, sources drawn by weight.

    sizes: items of each source. weights: one per source, or None for a lone source. names: of the sources, for errors.
    Raises DataError when one_epoch is set and a source would be read further than its end.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, num_samples: int, seed: int, one_epoch: bool,
                 names: Sequence[str]) -> None:
        self.sizes, self.num_samples, self.seed = list(sizes), num_samples, seed
        self._blend = None if weights is None else _csrc.blending_indices(normalize(weights), num_samples)
        self._epochs: dict[tuple[int, int], np.ndarray] = {}
        counts = [num_samples] if self._blend is None else np.bincount(self._blend[0], minlength=len(sizes)).tolist()
        for name, size, count in zip(names, sizes, counts):
            if one_epoch and count > size:
                raise DataError(f"{name} holds {size} samples in one epoch, but {count} are asked for; lower train.steps, give more data, or allow "
                                "several epochs (data.one_epoch=false)")

    def __len__(self) -> int:
        return self.num_samples

    def where(self, sample_numbers: np.ndarray) -> list[tuple[int, int]]:
        """(source, item) of each sample number. Raises DataError outside [0, len)."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        check_sample_numbers(numbers, len(self), "the training set")
        sources, draws = (np.zeros_like(numbers), numbers) if self._blend is None else (column[numbers] for column in self._blend)
        return [(source, int(self._epoch(source, draw // self.sizes[source])[draw % self.sizes[source]]))
                for source, draw in zip(sources.tolist(), draws.tolist())]

    def _epoch(self, source: int, epoch: int) -> np.ndarray:
        """The items of a source in the order of one epoch."""
        found = self._epochs.get((source, epoch))
        if found is None:
            found = np.random.default_rng([self.seed, source, epoch]).permutation(self.sizes[source])
            # Two epochs of a source are enough to cross from one into the next; they are made again when asked for again.
            self._epochs.pop((source, epoch - 2), None)
            self._epochs[source, epoch] = found
        return found


class Rows:
    """The rows of one source: conversations packed into seq_len places, or one in each row. documents_of(r) are a row's conversations."""

    def __init__(self, source: Conversations, seq_len: int, pack: bool) -> None:
        self.source, self.seq_len, self.is_packed = source, seq_len, pack
        self.lengths = np.array(source.tokens.sequence_lengths, dtype=np.int32) - 1
        if pack:
            self.documents, self.starts = _csrc.pack_best_fit(self.lengths, seq_len)
        else:
            self.documents, self.starts = np.arange(self.lengths.size), np.arange(self.lengths.size + 1)
        self.row_lengths = np.add.reduceat(self.lengths[self.documents].astype(np.int64), self.starts[:-1])

    def __len__(self) -> int:
        return self.row_lengths.size

    def documents_of(self, row: int) -> np.ndarray:
        """Numbers of the conversations of a row, in their order."""
        return self.documents[self.starts[row]:self.starts[row + 1]]

    def efficiency(self) -> float:
        """Share of places that hold a token of a conversation."""
        return float(self.row_lengths.sum()) / (len(self) * self.seq_len)

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, loss_mask: np.ndarray, position_ids: np.ndarray,
             segment_ids: np.ndarray) -> None:
        """Write a row into zeroed arrays [seq_len]; the padding is a segment of its own behind all others."""
        begin = 0
        for segment, document in enumerate(self.documents_of(row).tolist()):
            ids, end = self.source.tokens.get(document), begin + int(self.lengths[document])
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            loss_mask[begin:end] = self.source.masks.get(document)[1:]
            position_ids[begin:end] = np.arange(end - begin)
            segment_ids[begin:end] = segment
            begin = end
        position_ids[begin:] = np.arange(self.seq_len - begin)
        segment_ids[begin:] = self.starts[row + 1] - self.starts[row]


class PackedRows:
    """A dataset of `engine.stage.Dataset` over the rows of one or more sources."""

    rows_per_sample = 1

    def __init__(self, sources: Sequence[Rows], order: Order) -> None:
        self.sources, self.order = list(sources), order
        self.seq_len = self.sources[0].seq_len

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens, labels, position_ids int64 [b, s]; loss_mask float32 [b, s]; row int64 [b], the sample numbers; when packed segment_ids
        int32 [b, s], the number of the conversation in its row. Raises DataError for numbers outside the set."""
        shape = len(sample_numbers), self.seq_len
        batch = {"tokens": np.zeros(shape, np.int64), "labels": np.zeros(shape, np.int64), "loss_mask": np.zeros(shape, np.float32),
                 "position_ids": np.empty(shape, np.int64), "segment_ids": np.empty(shape, np.int32)}
        for k, (source, row) in enumerate(self.order.where(sample_numbers)):
            self.sources[source].fill(row, **{name: values[k] for name, values in batch.items()})
        if not self.sources[0].is_packed:
            del batch["segment_ids"]      # padding is on the right, which causal attention never sees
        return {name: torch.from_numpy(values) for name, values in batch.items()} | {"row": torch.tensor(sample_numbers, dtype=torch.int64)}

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Tokens before the padding in the longest of these rows."""
        return max(int(self.sources[source].row_lengths[row]) for source, row in self.order.where(sample_numbers))


def datasets(run, num_train: int, num_valid: int) -> tuple[PackedRows, dict[str, PackedRows]]:
    """The training set of num_train rows and the validation sets of num_valid each, as run.data and run.chat say.

    data.train is a list of files, which become one source, or WEIGHT FILE WEIGHT FILE ..., a source each. Raises DataError.
    """
    train = _dataset(run, "data.train", run.data.train, num_train, run.data.one_epoch)
    valid = {name: _dataset(run, f"data.valid.{name}", files, num_valid, False) for name, files in run.data.valid.items()} if num_valid else {}
    return train, valid


def _dataset(run, name: str, files: Sequence[str], num_samples: int, one_epoch: bool) -> PackedRows:
    paths, weights = parse_blend(files)
    groups = [paths] if weights is None else [[path] for path in paths]
    sources = [Rows(conversations(run, group), run.train.seq_len, run.chat.pack) for group in groups]
    names = [f"{name} ({', '.join(group)})" for group in groups]
    order = Order([len(rows) for rows in sources], weights, num_samples, run.run.seed, one_epoch, names)
    for group, rows in zip(groups, sources):
        log.info(f"{name}: {rows.lengths.size} conversations of {', '.join(group)} in {len(rows)} rows of {run.train.seq_len} tokens, "
                 f"{100 * rows.efficiency():.1f}% full")
    return PackedRows(sources, order)
