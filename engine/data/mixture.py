"""Mixtures that change during a run: data.train, then data.phases, with data.replay beside each of them.

    train = build_mixture(run.data, seq_len=4096, num_samples=100_000, seed=1234)     # len(), seq_len, gather(), counts()

Sources are all corpora that any list names, each once, read in its own order; a change of weights neither repeats nor skips a
sample of any of them. Sample i comes from the source that is furthest behind: greatest cumulated weight up to i, minus samples
already drawn. With constant weights that is Megatron's blend bit for bit (engine/data/blend.py), sizes of the sources included.
A list without weights counts each corpus by the samples of one pass over it; unlike in a plain blend it may repeat.
A source of data.max_epochs leaves with the last sample of its cap, and its weight goes to the others in proportion to theirs
(data.at_cap: drop), or the run is refused (stop). Lengths decide when that is, so it is known before training.

Left out: mixtures that answer to the loss, and changes of the validation sets.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine import _csrc
from engine.data.blend import SURPLUS, Blend, count_sources, normalize, parse_blend
from engine.data.indexed import DataError, IndexedCorpus
from engine.data.pretraining import GPTSamples, split_documents
from engine.data.storage import is_remote, open_corpus

ANY = "*"  # in data.max_epochs: every corpus that it does not name


@dataclass(frozen=True)
class Course:
    """How the weights go. From sample firsts[s] up to firsts[s + 1] each source's weight goes linearly from weights[s, 0] to
    weights[s, 1]; the last stretch is constant. firsts: int64 [stretches], from 0 upwards; weights: float64 [stretches, 2, sources]."""

    firsts: np.ndarray
    weights: np.ndarray

    def draw(self, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(source int16 [n], number of the sample within its source int64 [n])."""
        return _csrc.mixture_indices(self.firsts, self.weights, num_samples)[:2]

    def draw_capped(self, num_samples: int, caps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same where source k gives caps[k] samples at most (int64 [sources]); n is less than num_samples where none is left.
        Third: int64 [m, 2], the sources that leave, and the sample from which on they are missing."""
        return _csrc.mixture_indices(self.firsts, self.weights, num_samples, np.ascontiguousarray(caps, dtype=np.int64))

    def cumulated(self, num_samples: int) -> np.ndarray:
        """The share of each source among the first num_samples, in samples; float64 [sources]."""
        total = np.zeros(self.weights.shape[2])
        for s, first in enumerate(self.firsts.tolist()):
            length = self.firsts[s + 1] - first if s + 1 < self.firsts.size else math.inf
            begin, end = self.weights[s]
            t = max(0, min(num_samples - first, length))
            total += begin * t + (end - begin) / (2 * length) * t * t
        return total


def course(mixtures: Sequence[tuple[int, int, Sequence[float]]]) -> Course:
    """From (first sample, samples of the ramp towards it, weights that sum to 1), the first at sample 0 without a ramp.

    Where nothing changes there is no new stretch, so that a mixture repeated in a phase draws the same samples as without it.
    """
    now = np.array(mixtures[0][2], dtype=np.float64)
    firsts, weights = [0], [(now, now)]
    for first, ramp, target in mixtures[1:]:
        target = np.array(target, dtype=np.float64)
        if np.array_equal(now, target):
            continue
        for begin, before in ((first, now), (first + ramp, target)) if ramp else ((first, target),):
            if begin == firsts[-1]:  # the stretch before is empty
                firsts.pop(), weights.pop()
            firsts.append(begin)
            weights.append((before, target))
        now = target
    return Course(np.array(firsts, dtype=np.int64), np.array(weights))


class Mixture(Blend):
    """Samples of several datasets of one seq_len in the order that Course.draw gave. Raises DataError when a dataset runs out."""

    departures: Sequence[tuple[int, int]] = ()
    """Which dataset leaves at which sample, because its cap is reached."""

    def __init__(self, datasets: Sequence[GPTSamples], dataset_index: np.ndarray, dataset_sample_index: np.ndarray) -> None:
        self.datasets, self.seq_len = list(datasets), datasets[0].seq_len
        self.dataset_index, self.dataset_sample_index = dataset_index, dataset_sample_index
        for k, count in enumerate(self.counts(len(self)).tolist()):
            if count > len(self.datasets[k]):
                self._refuse(k, count)

    def _refuse(self, k: int, count: int) -> None:
        dataset = self.datasets[k]
        at = int(np.flatnonzero((self.dataset_index == k) & (self.dataset_sample_index == len(dataset)))[0])
        raise DataError(
            f"{dataset.corpus.prefix} ({dataset.split_name}): its {len(dataset)} samples run out at sample {at} of the mixture, after "
            f"{at * self.seq_len} tokens, and {count} are to be drawn of it; lower its weight or the number of steps, or allow several epochs"
        )


def build_mixture(
    data,
    seq_len: int,
    num_samples: int,
    seed: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Mixture:
    """The training set that a configuration's `data` section describes: train, phases, replay, replay_share, split, one_epoch, max_epochs, at_cap.

    May come out a few samples longer than num_samples, as a weighted blend does.
    Raises DataError: unreadable lists or corpora, a source without documents, with one_epoch or at_cap=stop one that runs out, and when,
    and caps that leave no source before num_samples.
    """
    lists = [data.train, *(phase.train for phase in data.phases)]
    prefixes = _union([*lists, *([data.replay] if data.replay else [])])
    corpora = [open_corpus(prefix, data.storage, cache_dir) for prefix in prefixes]
    parts = [_documents(corpus, data.split) for corpus in corpora]
    place = {_identity(prefix): k for k, prefix in enumerate(prefixes)}
    weigh = lambda items: _weights(items, place, corpora, parts, seq_len)  # noqa: E731
    replay = weigh(data.replay) if data.replay else None
    mixed = [_with_replay(weigh(items), replay, data.replay_share) for items in lists]
    path = course(list(zip(*_times(data.phases, seq_len), mixed)))

    shares = [math.ceil(share) for share in path.cumulated(num_samples)]
    epochs = _epochs(data.max_epochs, prefixes)
    caps = _caps(epochs, corpora, parts, seq_len)
    *index, departures = path.draw_capped(sum(shares), caps)
    left = [(k, at) for k, at in departures.tolist() if at < num_samples]
    _refuse_departures(left, data.at_cap, prefixes, epochs, caps, num_samples, seq_len)
    if index[0].size < num_samples:
        _refuse_end(index[0].size, num_samples, seq_len)
    # Beside Megatron's surplus, what is really drawn: changing weights leave a source further behind than constant ones do.
    drawn = count_sources(index[0], len(corpora)).tolist()
    if left:  # the others give more than their weights alone say
        shares = drawn
    wanted = [None if data.one_epoch else min(max(math.ceil(share * (1 + SURPLUS)), count), max(cap, count))
              for share, count, cap in zip(shares, drawn, caps.tolist())]
    datasets = [GPTSamples(*source, seq_len, seed, "train", cache_dir, data.one_epoch) for source in zip(corpora, parts, wanted)]
    mixture = Mixture(datasets, *index)
    mixture.departures = left
    return mixture


def _epochs(max_epochs: Mapping[str, float], prefixes: Sequence[str]) -> list[float]:
    """data.max_epochs for each prefix; infinite where there is none."""
    named = {_identity(prefix): epochs for prefix, epochs in max_epochs.items() if prefix != ANY}
    known = [_identity(prefix) for prefix in prefixes]
    for prefix in max_epochs:
        if prefix != ANY and _identity(prefix) not in known:
            near = difflib.get_close_matches(prefix, prefixes, n=1) or prefixes
            raise DataError(f"data.max_epochs names {prefix}, which no list of corpora does; did you mean {' or '.join(near[:5])}?")
    return [named.get(prefix, max_epochs.get(ANY, math.inf)) for prefix in known]


def _caps(epochs: list[float], corpora: list[IndexedCorpus], parts: list[np.ndarray], seq_len: int) -> np.ndarray:
    """How many samples those epochs hold, int64 [sources]: whole samples, the one token that labels the last included."""
    caps = np.full(len(corpora), np.iinfo(np.int64).max)
    for k, most in enumerate(epochs):
        if math.isfinite(most):
            tokens = math.floor(most * _num_tokens(corpora[k], parts[k]))
            caps[k] = (tokens - 1) // seq_len if tokens else 0
            if caps[k] == 0:
                raise DataError(f"data.max_epochs allows {most:g} epochs of {corpora[k].prefix}, {tokens} tokens, which hold no sample of {seq_len + 1}; "
                                "raise it, lower train.seq_len, or leave the corpus out")
    return caps


def _refuse_departures(left, at_cap: str, prefixes: list[str], epochs: list[float], caps: np.ndarray, num_samples: int, seq_len: int) -> None:
    if left and at_cap == "stop":
        k, at = left[0]
        raise DataError(f"{prefixes[k]} reaches its cap of {epochs[k]:g} epochs ({caps[k]} samples) at sample {at} of {num_samples}, after {at * seq_len} "
                        "tokens; lower its weight or the number of steps, raise data.max_epochs, or let the others go on (data.at_cap=drop)")


def _refuse_end(size: int, num_samples: int, seq_len: int) -> None:
    raise DataError(f"data.max_epochs leaves no source of the mixture after {size} samples ({size * seq_len} tokens), but {num_samples} are asked for; "
                    "lower the number of steps, raise data.max_epochs, or add corpora")


def _union(lists: Sequence[Sequence[str]]) -> list[str]:
    """Every prefix once, in the order in which they are first named."""
    named = {}
    for items in lists:
        for prefix in parse_blend(items)[0]:
            named.setdefault(_identity(prefix), prefix)
    return list(named.values())


def _identity(prefix: str) -> str:
    return prefix if is_remote(prefix) else os.path.realpath(prefix)


def _documents(corpus: IndexedCorpus, split: str) -> np.ndarray:
    documents = split_documents(len(corpus), split)[0] if split else range(len(corpus))
    return np.arange(documents.start, documents.stop)


def _weights(items: Sequence[str], place: dict[str, int], corpora: list[IndexedCorpus], parts: list[np.ndarray], seq_len: int) -> np.ndarray:
    """One list as weights of all sources, float64 [sources]; a corpus that is named twice gets both weights."""
    prefixes, weights = parse_blend(items)
    sources = [place[_identity(prefix)] for prefix in prefixes]
    if weights is None:
        weights = [(_num_tokens(corpora[k], parts[k]) - 1) // seq_len for k in sources]
        if sum(weights) <= 0:
            raise DataError(f"the corpora {', '.join(prefixes)} hold no sample of {seq_len + 1} tokens; lower train.seq_len, or give weights")
    total = np.zeros(len(corpora))
    np.add.at(total, sources, normalize(weights))
    return total


def _num_tokens(corpus: IndexedCorpus, documents: np.ndarray) -> int:
    return max(1, int(np.array(corpus.sequence_lengths)[documents].sum(dtype=np.int64)))


def _with_replay(weights: np.ndarray, replay: np.ndarray | None, share: float) -> np.ndarray:
    return weights if replay is None else (1 - share) * weights + share * replay


def _times(phases, seq_len: int) -> tuple[list[int], list[int]]:
    """First sample and samples of the ramp of each mixture; a change takes place at the first sample that begins after its token."""
    first = [-(-phase.after_tokens // seq_len) for phase in phases]
    last = [-(-(phase.after_tokens + phase.ramp_tokens) // seq_len) for phase in phases]
    return [0, *first], [0, *(end - begin for begin, end in zip(first, last))]
