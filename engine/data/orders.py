"""The order of a source's samples, kept when a run that has begun becomes longer or shorter or changes its mixture.

    train = kept(train, saved_orders, num_samples, cache_dir)     # saved_orders: of a checkpoint (ledger.py)

Megatron shuffles all epochs that a run needs together, so that other train.steps, or a phase that takes more of a source, mean another
order from the first sample on: a resumed run would read some samples again and others never. Here a source that a checkpoint has read
from keeps the order it had; where that is too short, further epochs follow it, shuffled with a seed of their own. A run that goes on as
it was begun, and every new one, is Megatron's.
Left out: sources whose corpus, seed or sample length changed (the ledger tells of those).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from engine.data.blend import Blend
from engine.data.pretraining import EpochPlan, GPTSamples


class Chained(Blend):
    """One source in several orders, one after the other."""

    def __init__(self, pieces: Sequence[GPTSamples]) -> None:
        self.datasets, sizes = list(pieces), [len(piece) for piece in pieces]
        first = self.datasets[0]
        self.seq_len, self.corpus, self.split_name, self.tokens_per_epoch = first.seq_len, first.corpus, first.split_name, first.tokens_per_epoch
        self.dataset_index = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        self.dataset_sample_index = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])


def sources_of(samples) -> list[GPTSamples | Chained]:
    """The sources of a Blend or Mixture; of a lone one, itself; none of anything else."""
    if isinstance(samples, GPTSamples | Chained):
        return [samples]
    return samples.datasets if isinstance(samples, Blend) else []


def order_of(source: GPTSamples | Chained) -> dict:
    """What the order of a source's samples follows from, as JSON."""
    pieces = source.datasets if isinstance(source, Chained) else [source]
    return {"tokens": source.tokens_per_epoch, "seq_len": source.seq_len,
            "pieces": [[piece.seed, piece.plan.num_epochs, piece.plan.num_samples_before_final] for piece in pieces]}


def kept(samples, orders: Mapping[str, Mapping], num_samples: int, cache_dir: str | None):
    """The dataset with the orders of its sources as `orders` has them by prefix; num_samples: what a lone source must hold."""
    sources = sources_of(samples)
    is_lone = sources == [samples]
    needed = [num_samples] if is_lone else samples.counts(len(samples)).tolist()
    times = Counter(source.corpus.prefix for source in sources)
    found = [_kept(source, orders[source.corpus.prefix], count, cache_dir) if source.corpus.prefix in orders and times[source.corpus.prefix] == 1 else source
             for source, count in zip(sources, needed)]
    if is_lone:
        return found[0]
    samples.datasets = found
    return samples


def _kept(source: GPTSamples, order: Mapping, num_samples: int, cache_dir: str | None) -> GPTSamples | Chained:
    now, (first, *later) = order_of(source), order["pieces"]
    is_other = (order["tokens"], order["seq_len"], first[0]) != (now["tokens"], now["seq_len"], source.seed)
    if is_other or now == order:
        return source
    build = lambda wanted, seed: GPTSamples(source.corpus, source.documents, wanted, source.seq_len, seed, source.split_name, cache_dir)  # noqa: E731
    pieces = []
    for seed, num_epochs, before_final in (first, *later):
        piece = build(_wanted(source, num_epochs, before_final), seed)
        assert piece.plan == EpochPlan(num_epochs, before_final), (piece.plan, num_epochs, before_final)
        pieces.append(piece)
    missing = num_samples - sum(map(len, pieces))
    if missing > 0:
        pieces.append(build(missing, (source.seed + len(pieces)) % 2**32))
    return pieces[0] if len(pieces) == 1 else Chained(pieces)


def _wanted(source: GPTSamples, num_epochs: int, before_final: int | None) -> int:
    """A number of samples for which plan_epochs plans this: the most that so many epochs hold, or one of a final epoch that stands alone."""
    return (num_epochs * source.tokens_per_epoch - 1) // source.seq_len if before_final is None else before_final + 1
