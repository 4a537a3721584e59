"""Mixtures of corpora: several GPTSamples drawn in a fixed order that keeps each one's count closest to its weight.

In: a list such as ["0.3", "web", "0.7", "code"] (or plain prefixes), a split string or one list per split, and the number
of samples of each split. Out: per split one dataset with len() and gather(), the same as GPTSamples.
Order and sizes equal megatron-core's BlendedMegatronDatasetBuilder bit for bit; no random numbers are involved.

Left out: mixtures that change during a run (mixture.py), several validation sets side by side, mock data, parallel index building.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from engine import _csrc
from engine.data.indexed import DataError, IndexedCorpus
from engine.data.pretraining import SPLIT_NAMES, GPTSamples, check_sample_numbers, split_documents, split_shares
from engine.data.storage import open_corpus

SURPLUS = 0.005  # Megatron's: each dataset of a weighted blend is built this much larger than its share


def parse_blend(items: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """(prefixes, weights) of a command-line list; weights is None for plain prefixes.

    An even list whose first, third, ... items are numbers reads as weight, prefix, weight, prefix; any other list is
    prefixes. Raises DataError: empty list, only some weights given, a weight that is not positive and finite.
    """
    items = [str(item) for item in items]
    if not items:
        raise DataError("the data list is empty; give at least one corpus prefix")
    weights = [_as_float(item) for item in items[0::2]] if len(items) % 2 == 0 else [None]
    if all(weight is None for weight in weights):
        return [item.strip() for item in items], None
    if any(weight is None for weight in weights):
        wrong = items[2 * weights.index(None)]
        raise DataError(f"data list: {wrong!r} stands where a weight is expected; write weight prefix weight prefix ..., or prefixes only")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"data list: weight {weight} is not a positive number; drop that corpus or give it a positive weight")
    return [item.strip() for item in items[1::2]], weights


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, with numpy's (pairwise) sum: the last bit decides ties."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def count_sources(dataset_index: np.ndarray, num_datasets: int) -> np.ndarray:
    """How often each dataset occurs in an index; int64 [num_datasets]. By pieces: bincount makes int64 of all it is given at once."""
    pieces = (dataset_index[i:i + 2**20] for i in range(0, dataset_index.size, 2**20))
    return sum((np.bincount(piece, minlength=num_datasets) for piece in pieces), start=np.zeros(num_datasets, dtype=np.int64))


class Blend:
    """num_samples samples drawn from several datasets of one seq_len in proportion to weights.

    num_samples None is the exhaustive form: every sample of every dataset once; weights are then not used.
    Raises DataError: weights that are not positive, a dataset without samples, a share larger than its dataset.
    """

    def __init__(self, datasets: Sequence[GPTSamples], weights: Sequence[float] | None, num_samples: int | None) -> None:
        self.datasets = list(datasets)
        self.seq_len = self.datasets[0].seq_len
        sizes = [len(dataset) for dataset in self.datasets]
        self._check(sizes, weights, num_samples)
        if num_samples is None:
            self.weights = None
            self.dataset_index, self.dataset_sample_index = _csrc.exhaustive_blending_indices(sizes)
        else:
            self.weights = normalize(weights)
            self.dataset_index, self.dataset_sample_index = _csrc.blending_indices(self.weights, num_samples)
        self._check_shares(sizes)

    def __len__(self) -> int:
        """Samples in the blend."""
        return self.dataset_index.size

    def gather(self, sample_numbers: np.ndarray, segments: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """As GPTSamples.gather: tokens int64 [n, seq_len + 1], with segments also int32 [n, seq_len]."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        check_sample_numbers(numbers, len(self), "the blend")
        self.announce(numbers)
        sources, samples = self.dataset_index[numbers], self.dataset_sample_index[numbers]
        tokens = np.empty((numbers.size, self.seq_len + 1), dtype=np.int64)
        ids = np.empty((numbers.size, self.seq_len), dtype=np.int32) if segments else None
        for k in np.unique(sources):
            is_from_k = sources == k
            if segments:
                tokens[is_from_k], ids[is_from_k] = self.datasets[k].gather(samples[is_from_k], segments=True)
            else:
                tokens[is_from_k] = self.datasets[k].gather(samples[is_from_k])
        return (tokens, ids) if segments else tokens

    def announce(self, sample_numbers: np.ndarray) -> None:
        """As GPTSamples.announce, to every source: they fetch side by side what gather would wait for one after the other."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        sources, samples = self.dataset_index[numbers], self.dataset_sample_index[numbers]
        for k in np.unique(sources):
            self.datasets[k].announce(samples[sources == k])

    def gather_into(self, sample_numbers: np.ndarray, tokens: np.ndarray, places: np.ndarray | None = None, num_threads: int = 1) -> None:
        """As GPTSamples.gather_into."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        check_sample_numbers(numbers, len(self), "the blend")
        self.announce(numbers)
        sources, samples = self.dataset_index[numbers], self.dataset_sample_index[numbers]
        for k in np.unique(sources):
            of_k = np.flatnonzero(sources == k)
            self.datasets[k].gather_into(samples[of_k], tokens, of_k if places is None else places[of_k], num_threads)

    def counts(self, upto: int) -> np.ndarray:
        """How many of the first `upto` samples each dataset gives; int64 [datasets]."""
        return count_sources(self.dataset_index[:upto], len(self.datasets))

    def source_of(self, j: int) -> tuple[int, int]:
        """(number of the dataset, number of the sample in it) of sample j."""
        check_sample_numbers(np.array([j]), len(self), "the blend")
        return int(self.dataset_index[j]), int(self.dataset_sample_index[j])

    def documents_of(self, j: int) -> list[tuple[int, int, int]]:
        """Documents of sample j, as GPTSamples.documents_of, numbered within the dataset that source_of(j) names."""
        dataset, sample = self.source_of(j)
        return self.datasets[dataset].documents_of(sample)

    def _check(self, sizes: list[int], weights: Sequence[float] | None, num_samples: int | None) -> None:
        if any(dataset.seq_len != self.seq_len for dataset in self.datasets):
            raise DataError(f"datasets of different seq_len {[d.seq_len for d in self.datasets]} cannot be blended; build them alike")
        if num_samples is None:
            for dataset, size in zip(self.datasets, sizes):
                if size == 0:
                    raise DataError(f"{dataset.corpus.prefix} ({dataset.split_name}) has 0 samples, expected at least 1; drop it or lower seq_len")
            return
        if num_samples < 0:
            raise DataError(f"num_samples is {num_samples}, expected 0 or more")
        if weights is None or len(weights) != len(self.datasets):
            raise DataError(f"{0 if weights is None else len(weights)} weights for {len(self.datasets)} datasets; give one weight each")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"weights are {list(weights)}, expected positive numbers; drop the corpora that should not be drawn from")

    def _check_shares(self, sizes: list[int]) -> None:
        for dataset, count, size in zip(self.datasets, self.counts(len(self)), sizes):
            if count > size:
                raise DataError(
                    f"{dataset.corpus.prefix} ({dataset.split_name}): the blend draws {count} samples, but only {size} were built; "
                    "lower its weight or the number of samples, or allow several epochs"
                )


Dataset = GPTSamples | Blend


def build_pretraining(
    blend: Sequence[str],
    split: str,
    seq_len: int,
    num_samples: Sequence[int | None],
    seed: int,
    cache_dir: str | os.PathLike[str] | None = None,
    one_epoch: bool = False,
    storage: str = "mmap",
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Train, valid and test datasets out of one blend, whose corpora are divided by the split string.

    num_samples: of train, valid and test; None means one pass over plain prefixes; 0 means the split is not needed and
    gives None. A weighted blend may come out a few samples longer; plain prefixes (several) are capped at one pass, so
    compare len() with what the run needs. one_epoch refuses to repeat documents. storage: as open_corpus.
    Raises DataError, among others when a split that is asked for gets no documents.
    """
    prefixes, weights = parse_blend(blend)
    corpora = [open_corpus(prefix, storage, cache_dir) for prefix in prefixes]
    shares = split_shares(split)
    built: list[Dataset | None] = []
    for i, (name, wanted) in enumerate(zip(SPLIT_NAMES, num_samples)):
        if wanted == 0 or (wanted is None and shares[i][1] <= shares[i][0]):
            built.append(None)
            continue
        parts = [split_documents(len(corpus), split)[i] for corpus in corpora]
        _check_parts(corpora, parts, split, name)
        built.append(_mix(corpora, parts, weights, wanted, seq_len, seed, name, cache_dir, one_epoch))
    return tuple(built)


def build_pretraining_per_split(
    blends: Sequence[Sequence[str] | None],
    seq_len: int,
    num_samples: Sequence[int | None],
    seed: int,
    cache_dir: str | os.PathLike[str] | None = None,
    one_epoch: bool = False,
    storage: str = "mmap",
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Train, valid and test datasets out of a blend each, every corpus used whole; None where a blend is None.

    Otherwise as build_pretraining. Raises DataError when samples are asked of a split without a blend.
    """
    built: list[Dataset | None] = []
    for name, blend, wanted in zip(SPLIT_NAMES, blends, num_samples):
        if not blend or wanted == 0:
            if wanted:
                raise DataError(f"{wanted} {name} samples are asked for, but no {name} data is given; list its corpora or ask for 0")
            built.append(None)
            continue
        prefixes, weights = parse_blend(blend)
        corpora = [open_corpus(prefix, storage, cache_dir) for prefix in prefixes]
        parts = [range(len(corpus)) for corpus in corpora]
        # Megatron drops the weight of a lone corpus in this form (no surplus, no blend around it).
        weights = None if len(prefixes) == 1 else weights
        built.append(_mix(corpora, parts, weights, wanted, seq_len, seed, name, cache_dir, one_epoch))
    return tuple(built)


def _check_parts(corpora: list[IndexedCorpus], parts: list[range], split: str, name: str) -> None:
    for corpus, documents in zip(corpora, parts):
        if len(documents) == 0:
            raise DataError(
                f"{corpus.prefix}: split {split!r} leaves 0 of {len(corpus)} documents for {name}, expected at least 1; "
                f"give {name} a larger share, more documents, or ask for 0 {name} samples"
            )


def _mix(
    corpora: list[IndexedCorpus],
    parts: list[range],
    weights: list[float] | None,
    num_samples: int | None,
    seq_len: int,
    seed: int,
    name: str,
    cache_dir: str | os.PathLike[str] | None,
    one_epoch: bool,
) -> Dataset:
    """One split: the samples of a lone corpus, a weighted blend, or a blend in proportion to the corpora's sizes."""

    def samples_of(k: int, wanted: int | None) -> GPTSamples:
        return GPTSamples(corpora[k], parts[k], wanted, seq_len, seed, name, cache_dir, one_epoch)

    if len(corpora) == 1 and weights is None:
        return samples_of(0, num_samples)
    if weights is None:
        datasets = [samples_of(k, None) for k in range(len(corpora))]
        sizes = [len(dataset) for dataset in datasets]
        if num_samples is None:
            return Blend(datasets, None, None)
        return Blend(datasets, sizes, min(num_samples, sum(sizes)))
    if num_samples is None:
        raise DataError(f"{name}: a blend with weights needs a number of samples; give one, or list the prefixes without weights")
    shares = [math.ceil(num_samples * weight) for weight in normalize(weights)]
    # With one_epoch the whole pass is there anyway, and the surplus must not make a fitting share look too large.
    surplus = 0.0 if one_epoch else SURPLUS
    datasets = [samples_of(k, math.ceil(share * (1 + surplus))) for k, share in enumerate(shares)]
    return Blend(datasets, normalize(weights), sum(shares))
