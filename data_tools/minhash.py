"""Near-duplicates among many documents: MinHash signatures, candidate pairs by bands, clusters.

In: the n-gram hashes of documents; signatures on disk. Out: for every document the number of the first document of its cluster.
The share of equal entries in two signatures estimates the Jaccard similarity of two sets of n-grams (Broder 1997), with a
standard error of sqrt(s (1 - s) / num_perm). Documents are candidates when all rows of one band agree; of similarity s they are
found with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).

One band is in memory at a time: some 40 bytes a document, and 16 more for each pair of candidates. Signatures (4 * num_perm
bytes a document) stay in a file. Left out: documents compared across machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_tools.cli import UsageError
from data_tools.words import mixed, ngrams, split_words

RECALL = 0.9  # of pairs right at the threshold, when bands are chosen here
NEIGHBOURS = 3  # in a bucket each document is paired with so many before it, and with the bucket's first
ROWS_AT_ONCE = 1 << 16
EMPTY = 0xFFFFFFFF  # no signature looks like a row of these; it marks a document without words


@dataclass(frozen=True)
class Bands:
    """num_bands bands of num_rows signature entries each."""

    num_bands: int
    num_rows: int

    def recall(self, similarity: float) -> float:
        """The probability that a pair of this similarity becomes a candidate."""
        return 1 - (1 - similarity**self.num_rows) ** self.num_bands


def choose_bands(threshold: float, num_perm: int, num_bands: int | None = None) -> Bands:
    """The longest bands that still find RECALL of the pairs at the threshold: the fewest false candidates.

    num_bands given: that many, as long as fit. Raises UsageError when they do not fit.
    """
    if num_bands is not None:
        if num_bands > num_perm:
            raise UsageError(f"--bands {num_bands}: a signature of --num-perm {num_perm} entries has at most that many bands")
        return Bands(num_bands, num_perm // num_bands)
    fitting = (Bands(num_perm // num_rows, num_rows) for num_rows in range(num_perm, 1, -1))
    return next((bands for bands in fitting if bands.recall(threshold) >= RECALL), Bands(num_perm, 1))


def signatures(texts: list[str], n: int, num_perm: int, seed: int) -> np.ndarray:
    """uint32 [num_texts, num_perm]; a text without words has a row of EMPTY."""
    from rensa import RMinHash

    hashes, _, offsets = ngrams(split_words(texts), n, short=True)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), num_perm, seed)
    rows = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), num_perm)
    rows[np.diff(offsets) == 0] = EMPTY
    return rows


def candidate_pairs(rows: np.ndarray, bands: Bands) -> Iterator[np.ndarray]:
    """Pairs int64 [n, 2], earlier document first, of documents that agree in a band; a pair may come several times.

    The first to come are equal signatures, after which only the first of equal ones takes part. Each document of a bucket is
    paired with the bucket's first and with the NEIGHBOURS before it, so that a bucket of m gives no more than (NEIGHBOURS + 1) m.
    """
    keys = _keys(rows, 0, rows.shape[1])
    numbers = np.flatnonzero(rows[:, 0] != EMPTY)
    order = numbers[np.argsort(keys[numbers], kind="stable")]
    is_first = _starts(keys[order])
    firsts = order[np.maximum.accumulate(np.where(is_first, np.arange(order.size), 0))]
    yield np.stack([firsts, order], axis=1)[~is_first]
    representatives = np.sort(order[is_first])
    for band in range(bands.num_bands):
        keys = _keys(rows, band * bands.num_rows, (band + 1) * bands.num_rows)[representatives]
        yield from _bucket_pairs(keys, representatives)


def _bucket_pairs(keys: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(keys, kind="stable")  # stable: within a bucket by document number
    keys, numbers = keys[order], numbers[order]
    for distance in range(1, NEIGHBOURS + 1):
        same = np.flatnonzero(keys[distance:] == keys[:-distance])
        yield np.stack([numbers[same], numbers[same + distance]], axis=1)
    begins = np.maximum.accumulate(np.where(_starts(keys), np.arange(keys.size), 0))
    far = np.flatnonzero(np.arange(keys.size) - begins > NEIGHBOURS)
    yield np.stack([numbers[begins[far]], numbers[far]], axis=1)


def _starts(keys: np.ndarray) -> np.ndarray:
    is_first = np.ones(keys.size, bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return is_first


def _keys(rows: np.ndarray, begin: int, end: int) -> np.ndarray:
    """One 64-bit hash of the entries [begin, end) of every signature: their sum with odd weights, modulo 2^64."""
    weights = mixed(np.arange(begin + 1, end + 1, dtype=np.uint64)) | np.uint64(1)
    keys = np.empty(rows.shape[0], np.uint64)
    for first in range(0, keys.size, ROWS_AT_ONCE):  # in pieces, because the product needs the entries as 64-bit numbers
        keys[first : first + ROWS_AT_ONCE] = rows[first : first + ROWS_AT_ONCE, begin:end].astype(np.uint64) @ weights
    return mixed(keys)


def similar_pairs(rows: np.ndarray, bands: Bands, threshold: float, verify: bool) -> np.ndarray:
    """Distinct candidate pairs int64 [n, 2]; with verify only those whose signatures agree in at least threshold of the entries."""
    kept = [np.zeros((0, 2), np.int64)]
    for pairs in candidate_pairs(rows, bands):
        for begin in range(0, pairs.shape[0], ROWS_AT_ONCE):
            some = pairs[begin : begin + ROWS_AT_ONCE]
            kept.append(some[estimates(rows, some) >= threshold] if verify else some)
    return np.unique(np.concatenate(kept), axis=0)


def estimates(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of each pair, float64 [n]."""
    return (rows[pairs[:, 0]] == rows[pairs[:, 1]]).mean(axis=1)


def first_of_equal(rows: np.ndarray) -> np.ndarray:
    """int64 [num_documents]: the first document with an equal row uint64 [2]."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable
    is_first = _starts(rows[order, 0]) | _starts(rows[order, 1])
    firsts = np.empty(order.size, np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(order.size), 0))]
    return firsts


def first_of_cluster(pairs: np.ndarray, num_documents: int) -> np.ndarray:
    """int64 [num_documents]: the earliest document that pairs connect with this one; itself when there is none earlier."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(pairs.shape[0], np.int8)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(num_documents, num_documents))
    _, labels = connected_components(graph, directed=False)
    _, firsts = np.unique(labels, return_index=True)
    return firsts[labels]
