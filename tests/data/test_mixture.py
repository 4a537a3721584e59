"""Mixtures that change: megatron's blend under constant weights, an exact reference under changing ones, no sample lost or repeated."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import merged

from engine import _csrc
from engine.config import ConfigError, validate
from engine.data.blend import build_pretraining_per_split, normalize
from engine.data.indexed import DataError
from engine.data.mixture import build_mixture, course
from engine.data.text import datasets

# --- the order of sources


def reference(mixtures, size):
    """The rule in exact numbers: weights are summed sample by sample, each taken in the middle of its sample."""
    num_sources = len(mixtures[0][2])
    behind, order = [Fraction(0)] * num_sources, []
    for i in range(size):
        weights = weights_at(mixtures, i)
        if i == 0:  # megatron's rule starts as if one sample had been drawn
            lags = weights
        else:
            lags = behind
        best = max((k for k in range(num_sources) if weights[k] > 0), key=lambda k: (lags[k], -k))
        order.append(best)
        behind = [b + w - (k == best) for k, (b, w) in enumerate(zip(behind, weights))]
    return order


def weights_at(mixtures, i):
    """Exact weights in the middle of sample i; (first, ramp, weights) as course() takes them."""
    now = [Fraction(w) for w in mixtures[0][2]]
    for first, ramp, target in mixtures[1:]:
        done = Fraction(0) if i < first else Fraction(1) if i >= first + ramp else Fraction(2 * (i - first) + 1, 2 * ramp)
        now = [a + done * (Fraction(b) - a) for a, b in zip(now, target)]
    return now


@st.composite
def changing(draw):
    """Mixtures whose weights (sixteenths) and ramps (powers of two) floating point sums exactly, so that ties are ties."""
    num_sources = draw(st.integers(1, 5))

    def weights():
        cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=num_sources - 1, max_size=num_sources - 1)))
        return [(b - a) / 16 for a, b in zip([0, *cuts], [*cuts, 16])]

    mixtures, first = [(0, 0, weights())], 0
    for _ in range(draw(st.integers(0, 4))):
        first += draw(st.integers(0 if first else 1, 40))
        ramp = draw(st.sampled_from([0, 1, 4, 32]))
        if mixtures[-1][0] + mixtures[-1][1] > first or (len(mixtures) > 1 and mixtures[-1][0] == first):
            continue
        mixtures.append((first, ramp, weights()))
    return mixtures


@settings(max_examples=300, deadline=None)
@given(changing(), st.integers(0, 200))
@example([(0, 0, [0.0, 1.0]), (3, 0, [1.0, 0.0])], 6)  # at a tie the first source leads, but not one of weight 0
@example([(0, 0, [0.5, 0.5]), (3, 32, [0.0, 1.0]), (35, 0, [0.5, 0.5])], 80)
def test_order_equals_an_exact_reference(mixtures, size):
    order, numbers = course(mixtures).draw(size)
    assert order.dtype == np.int16 and numbers.dtype == np.int64
    assert order.tolist() == reference(mixtures, size)
    for k in range(len(mixtures[0][2])):
        assert numbers[order == k].tolist() == list(range((order == k).sum()))  # nothing repeated, nothing lost


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12) | st.lists(st.sampled_from([1.0, 2.0]), min_size=1, max_size=12), st.integers(0, 500),
       st.integers(1, 300))
def test_constant_weights_equal_megatrons_bit_for_bit(megatron, raw, size, phase):
    weights = normalize(raw)
    dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    megatron.helpers.build_blending_indices(dataset, sample, np.array(weights), len(weights), size, False)
    for mixtures in ([(0, 0, weights)], [(0, 0, weights), (phase, 7, weights), (phase + 20, 0, weights)]):  # a phase that changes nothing
        order, numbers = course(mixtures).draw(size)
        assert np.array_equal(order, dataset) and np.array_equal(numbers, sample)
    ahead = np.bincount(order, minlength=len(weights)) - np.array(weights) * size
    assert ahead.max() <= 1 + 1e-9
    assert -ahead.min() <= sum(1 / k for k in range(1, len(weights) + 1))  # megatron's rule may leave one behind by more than 1: 5:5:5:1:1 does


def test_a_ramp_realises_its_shares():
    """From 90:10 to 20:80 between samples 1000 and 5000, counted over windows of 500 samples."""
    path = course([(0, 0, [0.9, 0.1]), (1000, 4000, [0.2, 0.8])])
    order, _ = path.draw(7000)
    for begin in range(0, 7000, 500):
        exact = sum(weights_at([(0, 0, [0.9, 0.1]), (1000, 4000, [0.2, 0.8])], i)[0] for i in range(begin, begin + 500))
        assert abs((order[begin:begin + 500] == 0).sum() - float(exact)) <= 1
    assert np.allclose(path.cumulated(7000), [900 + 0.55 * 4000 + 0.2 * 2000, 100 + 0.45 * 4000 + 0.8 * 2000], rtol=1e-12)
    assert np.allclose(path.cumulated(2000), [900 + (0.9 + 0.725) / 2 * 1000, 100 + (0.1 + 0.275) / 2 * 1000], rtol=1e-12)


def test_deviations_stay_small_through_many_changes():
    """Ten phases over six sources: never further from the cumulated weight than the harmonic number of the sources."""
    random = np.random.default_rng(0)
    mixtures = [(300 * s, 100 * (s % 3), normalize(random.uniform(0.05, 1, 6))) for s in range(10)]
    path = course(mixtures)
    order, _ = path.draw(3300)
    counts = np.cumsum(order[:, None] == np.arange(6), axis=0)
    ideal = np.array([path.cumulated(n) for n in range(1, 3301)])
    assert np.abs(counts - ideal).max() < sum(1 / k for k in range(1, 7))


@pytest.mark.parametrize("firsts, weights, words", [
    ([1], [[[1.0], [1.0]]], "start at 0"), ([0, 5, 5], [[[1.0], [1.0]]] * 3, "rise"), ([0], [[[0.5, 0.5], [1.0, 0.0]]], "cannot change"),
    ([0], [[[0.0], [0.0]]], "above 0"), ([0], [[[float("nan")], [1.0]]], "cannot change|above 0"),
])  # fmt: skip
def test_indices_refuse_what_is_no_course(firsts, weights, words):
    with pytest.raises(ValueError, match=words):
        _csrc.mixture_indices(np.array(firsts), np.array(weights), 10)


# --- the dataset


def section(train, phases=(), **fields):
    phases = [SimpleNamespace(after_tokens=after, ramp_tokens=ramp, train=items) for after, ramp, items in phases]
    return SimpleNamespace(**{"train": train, "phases": phases, "replay": [], "replay_share": 0.05, "split": "", "one_epoch": False, "max_epochs": {}, "at_cap": "drop",
                              "storage": "mmap", **fields})


@pytest.fixture
def three(make_corpus):
    return [make_corpus([9] * n, name, seed=n).prefix for n, name in ((60, "a"), (40, "b"), (20, "c"))]


def test_a_phase_that_changes_nothing_leaves_the_blend_as_it_is(three):
    a, b, c = three
    items = ["0.3", a, "5", b, "0.11", c]
    plain = build_pretraining_per_split([items, None, None], 7, [333, 0, 0], 11)[0]
    mixture = build_mixture(section(items, [(700, 70, items)]), 7, 333, 11)
    assert len(mixture) == len(plain)
    assert np.array_equal(mixture.gather(np.arange(len(plain))), plain.gather(np.arange(len(plain))))
    assert [len(dataset) for dataset in mixture.datasets] == [len(dataset) for dataset in plain.datasets]


def test_a_phase_goes_on_where_each_source_stood(three):
    """The samples of every source, in the order in which they are drawn, are its first samples, once each."""
    a, b, c = three
    mixture = build_mixture(section(["1", a, "1", b], [(140, 0, ["1", c]), (210, 140, ["3", b, "1", a])]), 7, 90, 11)
    order = mixture.dataset_index
    assert mixture.counts(20).tolist() == [10, 10, 0] and mixture.counts(30).tolist() == [10, 10, 10]
    assert mixture.counts(len(mixture)).sum() == len(mixture) >= 90
    assert abs((order[50:90] == 1).sum() - 30) <= 1
    for k, dataset in enumerate(mixture.datasets):
        rows = mixture.gather(np.flatnonzero(order == k))
        assert len(rows) and np.array_equal(rows, dataset.gather(np.arange(len(rows))))


def test_a_change_begins_with_the_first_whole_sample_after_its_token(three):
    a, b, _ = three
    for after, first in ((69, 10), (70, 10), (71, 11)):
        order = build_mixture(section(["1", a], [(after, 0, ["1", b])]), 7, 20, 11).dataset_index
        assert order.tolist() == [0] * first + [1] * (20 - first)


def test_replay_takes_its_share_of_every_phase(three):
    a, b, c = three
    mixture = build_mixture(section(["1", a], [(700, 0, ["1", b])], replay=["1", c], replay_share=0.2), 7, 200, 11)
    assert mixture.counts(100).tolist() == [80, 0, 20]
    assert (mixture.counts(200) - mixture.counts(100)).tolist() == [0, 80, 20]


def test_a_corpus_named_twice_is_one_source(three, tmp_path):
    a, b, _ = three
    mixture = build_mixture(section(["1", a, "1", b], replay=["1", f"{tmp_path}/./a"], replay_share=0.5), 7, 100, 11)
    assert [dataset.corpus.prefix for dataset in mixture.datasets] == [a, b]
    assert mixture.counts(100).tolist() == [75, 25]


def test_lists_without_weights_count_by_size(three):
    a, b, c = three  # 540, 360 and 180 tokens make 77, 51 and 25 samples
    mixture = build_mixture(section([a, b], [(1000 * 7, 0, [b, c])]), 7, 2000, 11)
    assert np.abs(mixture.counts(1000) - 1000 * np.array([77, 51, 0]) / 128).max() <= 1
    assert np.abs(mixture.counts(2000) - mixture.counts(1000) - 1000 * np.array([0, 51, 25]) / 76).max() <= 2


def test_the_split_applies_to_every_source(three):
    a, b, _ = three
    mixture = build_mixture(section(["1", a], [(70, 0, ["1", b])], split="8,2"), 7, 40, 11)
    assert [max(dataset.documents) for dataset in mixture.datasets] == [47, 31]


def draining(num_sources):
    """A course that drops, after every sample, the source that is furthest behind, so that the last one is drawn far ahead of its weight."""
    mixtures, left = [], list(range(num_sources))
    while left:
        mixtures.append((len(mixtures), 0, [(k in left) / len(left) for k in range(num_sources)]))
        path = course(mixtures)
        lags = path.cumulated(len(mixtures)) - np.bincount(path.draw(len(mixtures))[0], minlength=num_sources)
        left.remove(max(left, key=lambda k: lags[k]))
    return mixtures


def test_every_source_holds_what_is_drawn_of_it(make_corpus):
    """Megatron's surplus alone leaves a source short here. A corpus of 7 tokens makes exactly as many samples of 7 as are asked for."""
    prefixes = [make_corpus([7], f"s{k}").prefix for k in range(80)]
    lists = [[x for weight, prefix in zip(weights, prefixes) if weight for x in (repr(weight), prefix)] for _, _, weights in draining(80)]
    mixture = build_mixture(section(lists[0], [(7 * i, 0, items) for i, items in enumerate(lists) if i]), 7, 130, 1)
    assert len(mixture.gather(np.arange(len(mixture)))) == len(mixture) >= 130


def test_a_source_that_runs_out_is_named_with_the_time(three):
    a, b, _ = three  # 77 and 51 samples
    data = section(["1", a], [(70, 0, ["1", b])], one_epoch=True)
    assert len(build_mixture(data, 7, 61, 1)) == 61
    with pytest.raises(DataError, match=r"b \(train\): its 51 samples run out at sample 61 of the mixture, after 427 tokens, and 52 are to be drawn"):
        build_mixture(data, 7, 62, 1)


def test_unreadable_lists_are_refused(three):
    a, b, _ = three
    with pytest.raises(DataError, match="stands where a weight is expected"):
        build_mixture(section(["1", a], [(70, 0, ["1", a, b, "1"])]), 7, 20, 1)
    with pytest.raises(DataError, match=r"hold no sample of 1001 tokens"):
        build_mixture(section([a, b], [(70, 0, ["1", a])]), 1000, 20, 1)


# --- from a configuration


def test_a_configuration_with_phases_reads_the_mixture(raw_run, corpus):
    seq_len = raw_run["train"]["seq_len"]
    raw = merged(raw_run, {"data": {"train": ["1", corpus["train"]], "phases": [{"after_tokens": 8 * seq_len, "train": ["1", corpus["valid"]]}]}})
    train, valid = datasets(validate(raw), 24, 4)
    assert train.samples.counts(24).tolist() == [8, 16]
    assert len(train) >= 24 and list(valid) == ["held_out"]
    plain, _ = datasets(validate(raw_run), 24, 4)
    assert np.array_equal(train.batch(np.arange(8))["tokens"], plain.batch(np.arange(8))["tokens"])


@pytest.mark.parametrize("change, words", [
    ({"data": {"phases": [{"after_tokens": 0, "train": ["x"]}]}}, "data.phases.0 replaces data.train before its first token"),
    ({"data": {"phases": [{"after_tokens": 9, "ramp_tokens": 5, "train": ["x"]}, {"after_tokens": 13, "train": ["y"]}]}},
     r"data.phases.1 begins after 13 tokens, while data.phases.0 changes until 14"),
    ({"data": {"phases": [{"after_tokens": 9, "train": ["x"]}, {"after_tokens": 9, "train": ["y"]}]}}, "begins after 9 tokens, like"),
    ({"data": {"phases": [{"after_tokens": 9, "train": []}]}}, "data.phases.0.train is empty"),
    ({"stage": "sft", "data": {"phases": [{"after_tokens": 9, "train": ["x"]}]}}, "data.phases changes the corpora of .*, but stage=sft"),
    ({"data": {"replay": ["x"]}}, "data.replay is read by stage continued, but stage=pretrain"),
    ({"stage": "continued", "checkpoint": {"load": "x"}, "data": {"replay": ["x"], "replay_share": 0}}, "data.replay_share is 0"),
])  # fmt: skip
def test_configurations_that_cannot_be_meant_are_refused(raw_run, change, words):
    with pytest.raises(ConfigError, match=words):
        validate(merged(raw_run, change))


def test_a_hundred_million_samples_are_not_needed_for_shares_to_hold():
    """Rounding of large sums: after 20 million samples each count is still within two of its share."""
    path = course([(0, 0, normalize([3, 5, 11])), (10**6, 9 * 10**6, normalize([7, 1, 1]))])
    order, _ = path.draw(2 * 10**7)
    counts = np.bincount(order, minlength=3)
    assert np.abs(counts - path.cumulated(2 * 10**7)).max() <= 2 and math.isclose(counts.sum(), 2 * 10**7)
