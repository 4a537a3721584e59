"""Which source each sample of a blend comes from: 10 million samples of 100 sources, beside megatron-core's compiled helpers.

Weights are random (a flat Dirichlet draw), and all equal in the second line, where ties decide. The exhaustive form draws 1 million samples of
100 sources of random sizes. Both results are compared at the end.
"""

from collections.abc import Iterator

import numpy as np
from _data_indices import verdict
from _data_rows import Row, interleaved, optional, row, share

from engine import _csrc
from engine.data.blend import normalize

NUM_SOURCES = 100


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    size = 10_000 if quick else 10_000_000
    draws = np.random.default_rng(0)
    for name, weights in (("random weights", draws.dirichlet(np.ones(NUM_SOURCES))), ("equal weights", np.ones(NUM_SOURCES))):
        weights = normalize(weights)
        peer = optional("megatron-core", lambda weights=weights: megatron(np.array(weights), size))
        turns = interleaved({"megatron-core": peer, "ours": lambda weights=weights: _csrc.blending_indices(weights, size)}, rounds)
        yield row(f"blending {size:.0e} samples x {NUM_SOURCES} sources, {name}", turns, share(turns), "<= 0.3x", note=verdict(turns))
    sizes = draws.multinomial(size // 10 - NUM_SOURCES, draws.dirichlet(np.ones(NUM_SOURCES))) + 1
    peer = optional("megatron-core", lambda: megatron_exhaustive(sizes))
    turns = interleaved({"megatron-core": peer, "ours": lambda: _csrc.exhaustive_blending_indices(sizes.tolist())}, rounds)
    yield row(f"exhaustive blend, {size // 10:.0e} samples x {NUM_SOURCES} sources", turns, share(turns), "", note=verdict(turns))


def megatron(weights: np.ndarray, size: int):
    from megatron.core.datasets import helpers_cpp

    def step():
        dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        helpers_cpp.build_blending_indices(dataset, sample, weights, weights.size, size, False)
        return dataset, sample

    return step


def megatron_exhaustive(sizes: np.ndarray):
    from megatron.core.datasets import helpers_cpp

    def step():
        dataset, sample = np.zeros(sizes.sum(), dtype=np.int16), np.zeros(sizes.sum(), dtype=np.int64)
        helpers_cpp.build_exhaustive_blending_indices(dataset, sample, sizes, sizes.size)
        return dataset, sample

    return step
