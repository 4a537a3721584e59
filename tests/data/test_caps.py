"""Caps by epochs: equal to a course that says the same by hand, nothing repeated or lost, the same for every length of the run."""

import logging
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import section
from training import merged

from engine.config import ConfigError, validate
from engine.data.blend import normalize
from engine.data.indexed import DataError
from engine.data.mixture import Course, build_mixture, course
from engine.data.text import datasets

NONE = 2**60


def by_hand(path, caps, size):
    """The rule said with courses alone: draw, find the first source that has given all it may, write it out of what follows, again.
    Constant stretches only."""
    spent = set()
    while True:
        order, numbers = path.draw(size)
        ends = [(int(np.flatnonzero(order == k)[caps[k] - 1]) + 1, k) for k in range(len(caps)) if k not in spent and (order == k).sum() >= caps[k]]
        if not ends or min(ends)[0] >= size:
            return order, numbers, ends and [min(ends)] or []
        at, k = min(ends)
        spent.add(k)
        stretches = {}
        for s, first in enumerate(path.firsts.tolist()):
            weights = path.weights[s, 0].copy()
            end = path.firsts[s + 1] if s + 1 < path.firsts.size else math.inf
            if first < at:
                stretches[first] = weights.copy()
            if end > at:
                lost = weights[k]
                weights[k] = 0
                left = sum(weights.tolist())
                if left == 0:
                    return order[:max(first, at)], numbers[:max(first, at)], None
                stretches[max(first, at)] = weights / left if lost else weights
        path = Course(np.array(list(stretches)), np.array([[w, w] for w in stretches.values()]))


weight = st.floats(0.05, 1)
stretch = st.lists(weight, min_size=3, max_size=3).map(normalize)


@settings(max_examples=80, deadline=None)
@given(st.lists(stretch, min_size=1, max_size=4), st.integers(5, 60), st.lists(st.integers(1, 80), min_size=3, max_size=3), st.integers(1, 300))
def test_caps_equal_courses_written_by_hand(weights, length, caps, size):
    path = course([(length * i, 0, w) for i, w in enumerate(weights)])
    order, numbers, departures = path.draw_capped(size, np.array(caps))
    expected_order, expected_numbers, _ = by_hand(path, caps, size)
    assert order.tolist() == expected_order.tolist() and numbers.tolist() == expected_numbers.tolist()
    assert order.size == min(size, sum(caps))  # with caps on all, all of them can be read to the end
    for k, at in departures.tolist():
        assert order[at - 1] == k and numbers[at - 1] == caps[k] - 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0, 1, 7, 40]), stretch), min_size=0, max_size=3), stretch,
       st.lists(st.integers(1, 60) | st.just(NONE), min_size=3, max_size=3), st.integers(0, 250), st.integers(1, 100))
def test_ramps_and_caps_lose_nothing_and_do_not_depend_on_the_length(changes, begin, caps, size, more):
    mixtures, at = [(0, 0, begin)], 0
    for gap, ramp, weights in changes:
        mixtures.append((at + gap, ramp, weights))
        at += gap + ramp
    path, caps = course(mixtures), np.array(caps)
    order, numbers, departures = path.draw_capped(size, caps)
    longer, longer_numbers, longer_departures = path.draw_capped(size + more, caps)
    assert longer[:size].tolist() == order.tolist() and longer_numbers[:size].tolist() == numbers.tolist()  # any cut of a run reads the same
    assert longer_departures.tolist()[:len(departures)] == departures.tolist()
    assert order.size == min(size, caps.sum())
    for k, cap in enumerate(caps.tolist()):
        assert numbers[order == k].tolist() == list(range(min((order == k).sum(), cap)))
    if not departures.size:
        assert order.tolist() == path.draw(size)[0].tolist()
    assert departures.tolist() == sorted(departures.tolist(), key=lambda pair: pair[1])


def test_the_weight_of_a_spent_source_goes_to_the_others_in_proportion():
    path = course([(0, 0, [0.5, 0.375, 0.125])])
    order, _, departures = path.draw_capped(2000, np.array([100, NONE, NONE]))
    (k, at), = departures.tolist()
    assert k == 0 and abs(at - 200) <= 1
    assert np.abs(np.bincount(order[at:], minlength=3) - (2000 - at) * np.array([0, 0.75, 0.25])).max() <= 1


def test_during_a_ramp_the_others_share_what_its_ends_say():
    """From 60:30:10 to 20:20:60 without the first source it goes from 3/4:1/4 to 1/4:3/4."""
    path = course([(0, 0, [0.6, 0.3, 0.1]), (100, 4000, [0.2, 0.2, 0.6])])
    order, _, departures = path.draw_capped(8000, np.array([60, NONE, NONE]))
    at = departures[0, 1]
    assert 95 <= at <= 105
    counts = np.bincount(order[at:4100], minlength=3)
    assert abs(counts[1] - (4100 - at) / 2) <= 15 and counts[0] == 0
    assert abs((order[4100:] == 1).sum() - 3900 / 4) <= 1


def test_a_ramp_towards_a_spent_source_keeps_the_proportions_it_comes_from():
    path = course([(0, 0, [0.5, 0.3, 0.2]), (100, 100, [1.0, 0.0, 0.0])])
    order, _, departures = path.draw_capped(250, np.array([20, NONE, NONE]))
    assert departures[0].tolist() == [0, 40] or abs(departures[0, 1] - 40) <= 1
    assert order.size == 200  # then the mixture is of the spent source alone
    assert abs((order[100:200] == 1).sum() - 60) <= 1


# --- corpora


@pytest.fixture
def two(make_corpus):
    """400 and 90 tokens: 57 and 12 samples of 7 tokens an epoch."""
    return [make_corpus([10] * n, name, seed=n).prefix for n, name in ((40, "a"), (9, "b"))]


def test_a_capped_corpus_is_read_exactly_that_often(two):
    a, b = two
    mixture = build_mixture(section(["1", a, "1", b], max_epochs={b: 3}), 7, 200, 11)
    cap = (3 * 90 - 1) // 7
    (k, at), = mixture.departures
    assert k == 1 and mixture.counts(at).tolist() == [at - cap, cap] and mixture.counts(len(mixture))[1] == cap
    read = Counter()
    for i in np.flatnonzero(mixture.dataset_index == 1).tolist():
        for document, offset, count in mixture.documents_of(i):
            read.update((document, offset + t) for t in range(count))
    shared = cap - 1  # neighbouring samples share the token that labels the one and begins the other
    assert max(read.values()) <= 4 and sum(read.values()) == 7 * cap + cap
    assert sum(read.values()) - shared == 3 * 90 - (3 * 90 - 1) % 7


def test_without_a_cap_in_reach_nothing_changes(two):
    a, b = two
    items = ["0.9", a, "0.1", b]
    free, capped = (build_mixture(section(items, max_epochs=caps), 7, 110, 11) for caps in ({}, {"*": 2}))
    assert len(free) == len(capped) and capped.departures == []
    assert np.array_equal(free.gather(np.arange(110)), capped.gather(np.arange(110)))


def test_the_star_stands_for_those_that_are_not_named(two, tmp_path):
    a, b = two
    mixture = build_mixture(section(["1", a, "1", b], max_epochs={"*": 1, f"{tmp_path}/./a": 2.5}), 7, 150, 11)
    assert [(k, int(mixture.counts(at)[k])) for k, at in mixture.departures] == [(1, 12)]
    mixture = build_mixture(section(["1", a, "1", b], max_epochs={"*": 1, a: 2.5}), 7, 154, 11)
    assert mixture.counts(154).tolist() == [(1000 - 1) // 7, 12]


def test_caps_and_phases(two, make_corpus):
    """A corpus that leaves in one phase is missing in the next; one that a phase brings in is counted from there."""
    (a, b), c = two, make_corpus([10] * 20, "c").prefix
    mixture = build_mixture(section(["1", a, "1", b], [(70 * 7, 0, ["1", b, "1", c, "2", a])], max_epochs={b: 1, c: 1}), 7, 160, 11)
    order = mixture.dataset_index
    assert [k for k, _ in mixture.departures] == [1, 2] and mixture.departures[0][1] < 70
    assert (order == 1).sum() == 12 and (order == 2).sum() == 28 and np.flatnonzero(order == 2)[0] >= 70
    assert abs((order[70:100] == 2).sum() - 10) <= 1


@pytest.mark.parametrize("fields, steps, words", [
    ({"max_epochs": {"b": 1}, "at_cap": "stop"}, 60, r"b reaches its cap of 1 epochs \(12 samples\) at sample 24 of 60, after 168 tokens; .*at_cap=drop"),
    ({"max_epochs": {"*": 1}}, 70, r"max_epochs leaves no source of the mixture after 69 samples \(483 tokens\), but 70 are asked for"),
    ({"max_epochs": {"bb": 1}}, 10, r"max_epochs names .*bb, which no list of corpora does; did you mean .*b\?"),
    ({"max_epochs": {"b": 0.05}}, 10, "0.05 epochs of .*b, 4 tokens, which hold no sample of 8"),
], ids=["stop", "nothing left", "unknown", "too small"])  # fmt: skip
def test_caps_that_cannot_be_kept_are_refused(two, fields, steps, words):
    a, b = two
    named = {name if name == "*" else b.removesuffix("b") + name: epochs for name, epochs in fields["max_epochs"].items()}
    with pytest.raises(DataError, match=words):
        build_mixture(section(["1", a, "1", b], **{**fields, "max_epochs": named}), 7, steps, 11)


def test_stop_lets_a_run_that_ends_at_the_cap_pass(two):
    a, b = two
    assert len(build_mixture(section(["1", a, "1", b], max_epochs={b: 1}, at_cap="stop"), 7, 24, 11)) >= 24


def test_a_configuration_says_at_the_start_what_leaves_and_when(raw_run, corpus, caplog):
    """The small corpus holds 17 samples of 32 tokens; in steps of 4 its last one is in the ninth."""
    raw = merged(raw_run, {"data": {"train": ["1", corpus["train"], "1", corpus["valid"]], "max_epochs": {corpus["valid"]: 1}}, "train": {"steps": 15}})
    logger = logging.getLogger("engine.data.text")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "engine.data.text"):
            train, _ = datasets(validate(raw), 60, 0)
    finally:
        logger.removeHandler(caplog.handler)
    (_, at), = train.samples.departures
    cap = int(train.samples.counts(at)[1])
    assert f"valid reaches its cap of {cap} samples" in caplog.text and f"at sample {at - 1} (step {(at - 1) // 4 + 1}); from sample {at} on" in caplog.text


def test_a_cap_is_above_zero(raw_run):
    with pytest.raises(ConfigError, match="data.max_epochs.x=0: input should be greater than 0"):
        validate(merged(raw_run, {"data": {"max_epochs": {"x": 0}}}))


def test_departures_are_in_order_of_time_for_many_sources():
    random = np.random.default_rng(3)
    path = course([(0, 0, normalize(random.uniform(0.1, 1, 200)))])
    caps = random.integers(1, 400, 200)
    order, numbers, departures = path.draw_capped(10**6, caps)
    assert order.size == caps.sum() == np.bincount(order, minlength=200).sum() and len(departures) == 200
    assert all(a[1] <= b[1] for a, b in pairwise(departures.tolist()))
