"""Pretraining samples of one corpus: documents shuffled, laid end to end, cut every seq_len tokens, shuffled again.

In: an IndexedCorpus, the numbers of the documents that belong to the split, how many samples are wanted. Out: any set of
samples as one int64 block [n, seq_len + 1]; neighbours in the stream share one token, so [:, :-1] are inputs and [:, 1:] labels.
The order equals Megatron's GPTDataset bit for bit (same seed, same samples), which needs numpy's legacy RandomState.

"Document" here means one sequence of the corpus, as in Megatron: the two differ only where documents have several sequences.
Left out: samples without the extra token, a last shorter validation sample, fill-in-the-middle.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass

import numpy as np

from engine import _csrc
from engine.data.index_cache import cached_arrays, digest
from engine.data.indexed import DataError, IndexedCorpus

SPLIT_NAMES = ("train", "valid", "test")
FINAL_EPOCH_THRESHOLD = 0.80  # Megatron's: a final epoch used for less than this share is shuffled on its own
INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")
INT32_MAX = np.iinfo(np.int32).max


def split_shares(split: str) -> list[tuple[float, float]]:
    """The begin and end, in [0, 1], of train, valid and test for a string such as "969,30,1".

    Raises DataError unless the string holds one to three numbers with a positive sum.
    """
    try:
        parts = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or sum(parts) <= 0:
        raise DataError(f'split is {split!r}; expected one to three numbers for train,valid,test, for example "969,30,1"')
    shares = np.array(parts + [0.0] * (3 - len(parts)))
    bounds = list(itertools.accumulate((shares / shares.sum()).tolist(), initial=0.0))
    return list(zip(bounds[:-1], bounds[1:]))


def split_documents(num_documents: int, split: str) -> tuple[range, range, range]:
    """The document numbers of train, valid and test; each a contiguous, possibly empty range."""
    ranges = [range(round(begin * float(num_documents)), round(end * float(num_documents))) for begin, end in split_shares(split)]
    return tuple(ranges)


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are repeated, and how many samples precede a final epoch that is shuffled on its own."""

    num_epochs: int
    num_samples_before_final: int | None  # None: all epochs are shuffled together


def plan_epochs(num_tokens: int, num_samples: int | None, seq_len: int) -> EpochPlan:
    """The least number of epochs of num_tokens tokens that holds num_samples samples; one epoch when that is None."""
    if num_samples is None:
        return EpochPlan(1, None)
    num_epochs = max(1, -(-(num_samples * seq_len + 1) // num_tokens))
    if num_epochs == 1:
        return EpochPlan(1, None)
    before_final = ((num_epochs - 1) * num_tokens - 1) // seq_len
    samples_per_epoch = (num_tokens - 1) // seq_len
    is_separate = num_samples - before_final < int(FINAL_EPOCH_THRESHOLD * samples_per_epoch)
    return EpochPlan(num_epochs, before_final if is_separate else None)


class GPTSamples:
    """The samples of one split of one corpus.

    documents: range or int array of sequence numbers, in corpus order. num_samples: how many are wanted (the documents are
    repeated for whole epochs until there are that many), or None for one pass. one_epoch refuses to repeat.
    cache_dir keeps the indices as .npy files between runs and shares them between ranks.
    Raises DataError: no documents, fewer tokens than one sample, more samples than one epoch holds with one_epoch.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        documents: range | np.ndarray,
        num_samples: int | None,
        seq_len: int,
        seed: int,
        split_name: str,
        cache_dir: str | os.PathLike[str] | None = None,
        one_epoch: bool = False,
        num_threads: int = 1,
    ) -> None:
        self.corpus, self.seq_len, self.seed, self.split_name = corpus, seq_len, seed, split_name
        self.num_threads = num_threads
        self.documents = self._check_documents(documents)
        self._check_sizes(num_samples)
        self.tokens_per_epoch = int(_of(self.documents, corpus.sequence_lengths).sum(dtype=np.int64))
        self._check_tokens(num_samples, one_epoch)
        self.plan = plan_epochs(self.tokens_per_epoch, num_samples, seq_len)
        self.document_index, self.sample_index, self.shuffle_index = self._load_or_build(cache_dir)

    def __len__(self) -> int:
        """Samples available; at least the number asked for."""
        return self.sample_index.shape[0] - 1

    def gather(self, sample_numbers: np.ndarray, segments: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n, seq_len + 1] of n samples; with segments also int32 [n, seq_len].

        A segment id is the running number, from 0, of the document within its row. Raises DataError beyond the last sample.
        """
        rows = self._rows(sample_numbers)
        tokens, ids = self.corpus.gather(
            self.document_index, self.sample_index, rows, self.seq_len, segments=segments, num_threads=self.num_threads
        )
        return (tokens, ids) if segments else tokens

    def announce(self, sample_numbers: np.ndarray) -> None:
        """Says which samples are gathered next: storage that answers slowly fetches them meanwhile."""
        if self.corpus.listens:
            self.corpus.announce(self.document_index, self.sample_index, self._rows(sample_numbers), self.seq_len)

    def gather_into(self, sample_numbers: np.ndarray, tokens: np.ndarray, places: np.ndarray | None = None, num_threads: int = 1) -> None:
        """Write the samples into tokens, int64 [n, seq_len + 1], C-contiguous; with places (int64 [n]) sample i into row places[i], and
        tokens may have more rows. The GIL is let go meanwhile. Raises DataError beyond the last sample."""
        rows = self._rows(sample_numbers)
        self.corpus.gather(self.document_index, self.sample_index, rows, self.seq_len, num_threads=num_threads, tokens_out=tokens, places=places)

    def documents_of(self, j: int) -> list[tuple[int, int, int]]:
        """Where sample j comes from: (document number, first token within it, number of tokens), seq_len + 1 in all."""
        row = int(self._rows(np.array([j]))[0])
        (first, begin), (last, end) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        lengths = self.corpus.sequence_lengths
        parts = []
        for position in range(first, last + 1):
            document = int(self.document_index[position])
            offset = begin if position == first else 0
            stop = end + 1 if position == last else int(lengths[document])
            if stop > offset:
                parts.append((document, offset, stop - offset))
        return parts

    def _rows(self, sample_numbers: np.ndarray) -> np.ndarray:
        """Rows of the sample index, int64 [n]."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        check_sample_numbers(numbers, len(self), f"{self.corpus.prefix} ({self.split_name})")
        return self.shuffle_index[numbers].astype(np.int64)

    def _name(self) -> str:
        return f"{self.corpus.prefix}: the {self.split_name} split"

    def _check_documents(self, documents: range | np.ndarray) -> range | np.ndarray:
        """A range where the documents follow each other (a split of a billion documents then takes no memory), otherwise int32 [n]."""
        if len(documents) == 0:
            raise DataError(
                f"{self._name()} has 0 of {len(self.corpus)} documents, expected at least 1; give it a larger share, or more documents"
            )
        if len(self.corpus) > INT32_MAX:
            raise DataError(f"{self.corpus.prefix}: {len(self.corpus)} documents, the order holds at most {INT32_MAX}; split the corpus")
        documents = _as_range(documents)
        least, greatest = (documents[0], documents[-1]) if isinstance(documents, range) else (documents.min(), documents.max())
        if least < 0 or greatest >= len(self.corpus):
            raise DataError(
                f"{self._name()} names documents {least} to {greatest}, but the corpus has {len(self.corpus)}; "
                "use split_documents(len(corpus), ...)"
            )
        return documents if isinstance(documents, range) else documents.astype(np.int32)

    def _check_sizes(self, num_samples: int | None) -> None:
        if self.seq_len < 1:
            raise DataError(f"seq_len is {self.seq_len}, expected at least 1")
        if num_samples is not None and num_samples < 0:
            raise DataError(f"num_samples is {num_samples}, expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed is {self.seed}, expected 0 to {2**32 - 1}")

    def _check_tokens(self, num_samples: int | None, one_epoch: bool) -> None:
        if self.tokens_per_epoch == 0:
            raise DataError(f"{self._name()} has 0 tokens in {len(self.documents)} documents; add documents that are not empty")
        available = (self.tokens_per_epoch - 1) // self.seq_len
        if available == 0 and (num_samples is None or one_epoch):
            raise DataError(
                f"{self._name()} has {self.tokens_per_epoch} tokens, fewer than one sample of {self.seq_len + 1}; "
                "lower seq_len, add documents, or allow several epochs"
            )
        if one_epoch and num_samples is not None and num_samples > available:
            raise DataError(
                f"{self._name()} holds {available} samples of {self.seq_len} tokens in one epoch, but {num_samples} are asked for; "
                "lower the number of steps, add documents, or allow several epochs (one_epoch=False)"
            )

    def _load_or_build(self, cache_dir: str | os.PathLike[str] | None) -> tuple[np.ndarray, ...]:
        if cache_dir is None:
            return self._build()
        return cached_arrays(os.fspath(cache_dir), self._describe(), INDEX_NAMES, self._build, self._fits)

    def _describe(self) -> dict:
        """All that the indices depend on: lengths and documents by content, so a rewritten corpus never meets an old cache."""
        documents = self.documents
        return {
            "class": "GPTSamples",
            "version": 2,
            "split": self.split_name,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "num_epochs": self.plan.num_epochs,
            "num_samples_before_final_epoch": self.plan.num_samples_before_final,
            "lengths": digest(_of(documents, self.corpus.sequence_lengths)),
            "documents": [documents.start, documents.stop] if isinstance(documents, range) else digest(documents),
        }

    def _num_rows(self) -> int:
        return (self.plan.num_epochs * self.tokens_per_epoch - 1) // self.seq_len

    def _fits(self, arrays: tuple[np.ndarray, ...]) -> bool:
        shapes = ((len(self.documents) * self.plan.num_epochs,), (self._num_rows() + 1, 2), (self._num_rows(),))
        return tuple(a.shape for a in arrays) == shapes

    def _build(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return build_indices(self.corpus.sequence_lengths, self.documents, self.tokens_per_epoch, self.plan, self.seq_len, self.seed)


def build_indices(lengths: np.ndarray, documents: range | np.ndarray, num_tokens: int, plan: EpochPlan, seq_len: int,
                  seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document index, sample index, shuffle index) of documents that hold num_tokens tokens. lengths: int32, of the whole corpus.

    Memory for a range of d documents, e epochs and n samples: 4 d bytes for their lengths while it builds, 4 e d + 12 n bytes for the result.
    """
    # The lengths are looked up in a random order: they are copied into memory, and only those of the documents.
    first, lengths = (documents.start, np.array(_of(documents, lengths))) if isinstance(documents, range) else (0, np.array(lengths))
    # One generator for both shuffles, in this order: Megatron's order of draws is part of the format.
    random = np.random.RandomState(seed)
    document_index = _document_order(range(len(documents)) if isinstance(documents, range) else documents, plan, random)
    build = _csrc.sample_index_int32 if document_index.size <= INT32_MAX else _csrc.sample_index_int64
    sample_index = build(lengths, document_index, seq_len, plan.num_epochs * num_tokens)
    if first:
        document_index += np.int32(first)
    shuffle_index = _shuffled_range(sample_index.shape[0] - 1, plan.num_samples_before_final, random)
    return document_index, sample_index, shuffle_index


def _as_range(documents: range | np.ndarray) -> range | np.ndarray:
    """An array of numbers that follow each other as a range."""
    if isinstance(documents, range):
        return documents
    documents = np.asarray(documents)
    first, last = int(documents[0]), int(documents[-1])
    if last - first + 1 == documents.size and (documents[1:] == documents[:-1] + 1).all():
        return range(first, last + 1)
    return documents


def _of(documents: range | np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The lengths of these documents; of a range a view."""
    return lengths[documents.start:documents.stop] if isinstance(documents, range) else lengths[documents]


def check_sample_numbers(numbers: np.ndarray, num_samples: int, name: str) -> None:
    """Raises DataError when a sample number lies outside [0, num_samples)."""
    if numbers.size and (numbers.min() < 0 or numbers.max() >= num_samples):
        wrong = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
        raise DataError(
            f"{name}: sample {wrong} is asked for, but there are {num_samples} (0 to {num_samples - 1}); "
            "lower the number of steps, or build the dataset with more samples"
        )


def _document_order(documents: range | np.ndarray, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """int32 [num_epochs * num_documents]; a separate final epoch is shuffled after, and apart from, the others."""
    order = np.arange(documents.start, documents.stop, dtype=np.int32) if isinstance(documents, range) else documents.copy()
    if plan.num_epochs > 1:
        order = np.tile(order, plan.num_epochs)
    boundary = order.size if plan.num_samples_before_final is None else order.size - len(documents)
    for part in (order[:boundary], order[boundary:]):
        _shuffle(part, random)
    return order


def _shuffled_range(total: int, before_final: int | None, random: np.random.RandomState) -> np.ndarray:
    """A permutation of [0, total); samples of a separate final epoch stay behind the others."""
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    order = np.arange(total, dtype=dtype)
    boundary = total if before_final is None else before_final
    for part in (order[:boundary], order[boundary:]):
        _shuffle(part, random)
    return order


def _shuffle(values: np.ndarray, random: np.random.RandomState) -> None:
    """random.shuffle(values) of 4-byte or 8-byte integers, four times as fast, with the same result and the same state after it."""
    if values.size > 2**32:
        random.shuffle(values)
        return
    name, words, position, *rest = random.get_state()
    random.set_state((name, words, _csrc.shuffle(values, words, position), *rest))
