"""Building the order of one corpus: document order, sample index and shuffle index, beside what megatron-core's GPTDataset does.

3.3 million documents of about 303 tokens (log-normal, 1e9 tokens in all), seq_len 2048, one epoch and three of which the last is shuffled on its
own. The peer is megatron-core's compiled build_sample_idx and numpy's RandomState.shuffle on arrays that are laid out beforehand; ours is all that
GPTSamples builds. Both results are compared at the end. Left out: reading lengths from the .idx file, and the cache.
"""

from collections.abc import Iterator

import numpy as np
from _data_rows import Row, interleaved, optional, row, share

from engine.data.pretraining import EpochPlan, build_indices, plan_epochs

SEED, SEQ_LEN = 1234, 2048


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    num_documents = 20_000 if quick else 3_300_000
    lengths = np.random.default_rng(0).lognormal(5.2, 1.0, num_documents)
    lengths = (lengths * 303 / lengths.mean()).astype(np.int32)
    documents, tokens = np.arange(num_documents, dtype=np.int32), int(lengths.sum(dtype=np.int64))
    for epochs, plan in (("1 epoch", plan_epochs(tokens, None, SEQ_LEN)), ("2.5 epochs", plan_epochs(tokens, 5 * tokens // SEQ_LEN // 2, SEQ_LEN))):
        peer = optional("megatron-core", lambda plan=plan: megatron(lengths, documents, tokens, plan))
        turns = interleaved({"megatron-core + numpy": peer, "ours": ours(lengths, tokens, plan)}, rounds)
        work = f"sample index + shuffles, {tokens:.2g} tokens, {num_documents:.2g} documents, {epochs}"
        yield row(work, turns, share(turns), "<= 0.5x", note=verdict(turns))


def ours(lengths: np.ndarray, tokens: int, plan: EpochPlan):
    return lambda: build_indices(lengths, range(lengths.size), tokens, plan, SEQ_LEN, SEED)


def megatron(lengths: np.ndarray, documents: np.ndarray, tokens: int, plan: EpochPlan):
    """The calls of GPTDataset._build_document_sample_shuffle_indices, in its order."""
    from megatron.core.datasets import helpers_cpp

    def step():
        random = np.random.RandomState(SEED)
        groups = [plan.num_epochs] if plan.num_samples_before_final is None else [plan.num_epochs - 1, 1]
        parts = [np.tile(documents, n) for n in groups]
        for part in parts:
            random.shuffle(part)
        order = np.concatenate(parts) if len(parts) > 1 else parts[0]
        samples = helpers_cpp.build_sample_idx_int32(lengths, order, SEQ_LEN, plan.num_epochs, tokens, True, 1)
        total = samples.shape[0] - 1
        before = total if plan.num_samples_before_final is None else plan.num_samples_before_final
        shuffles = [np.arange(0, before, dtype=np.uint32), np.arange(before, total, dtype=np.uint32)]
        for part in shuffles[:1 if before == total else 2]:
            random.shuffle(part)
        return order, samples, np.concatenate(shuffles) if before < total else shuffles[0]

    return step


def verdict(turns) -> str:
    """Whether peer and ours answered the same."""
    if len(turns) < 2:
        return "peer missing"
    theirs, ours = (own.answer for own in turns.values())
    return "identical" if all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)) else "DIFFERENT RESULTS"
