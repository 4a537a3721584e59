"""The ledger: counts of any stretch of a run, what a checkpoint keeps of them, and what is said when a configuration contradicts it."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import section

from engine.data.blend import Blend, build_pretraining_per_split
from engine.data.indexed import DataError, IndexedCorpus
from engine.data.ledger import Ledger, names_of, source_numbers
from engine.data.mixture import build_mixture
from engine.data.orders import Chained, kept, order_of
from engine.data.pretraining import GPTSamples
from engine.data.text import NextToken


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    from engine.data.indexed import IndexedWriter

    found = []
    for name, documents in (("a", 60), ("b", 40), ("c", 20)):
        found.append(str(tmp_path_factory.mktemp("ledger") / name))
        with IndexedWriter(found[-1], np.uint16) as writer:
            for d in range(documents):
                writer.add_document(np.arange(d, d + 9))
    return found


@pytest.fixture(scope="module")
def blend(prefixes):
    a, b, c = prefixes
    return build_pretraining_per_split([["3", a, "2", b, "1", c], None, None], 7, [150, 0, 0], 11)[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6))
def test_counts_are_those_of_the_samples_in_whatever_order_one_asks(blend, stands):
    ledger = Ledger(NextToken(blend))
    for consumed in stands:
        expected = Counter(blend.source_of(i)[0] for i in range(consumed))
        assert ledger.read(consumed) == {dataset.corpus.prefix: (expected[k], 7 * expected[k]) for k, dataset in enumerate(blend.datasets)}


def test_a_record_tells_samples_tokens_and_epochs_of_what_was_read(blend, prefixes):
    a, b, c = prefixes
    found = Ledger(NextToken(blend)).record(60)["sources"]
    assert found[a] == {"samples": 30, "tokens": 210, "epochs": 210 / 540} and found[c] == {"samples": 10, "tokens": 70, "epochs": 70 / 180}
    assert set(Ledger(NextToken(blend)).record(1)["sources"]) == {a}  # not those that gave nothing


def test_a_lone_corpus_and_data_without_sources(prefixes, blend):
    samples = GPTSamples(blend.datasets[0].corpus, np.arange(60), 50, 7, 1, "train")
    assert Ledger(NextToken(samples)).read(20) == {prefixes[0]: (20, 140)}
    ledger = Ledger(object())
    ledger.begin(10, {"consumed_samples": 10, "read": {}, "before": {}, "orders": {}}, is_same_run=True)
    assert ledger.record(10) == {} and ledger.state(10) == {}


def test_a_corpus_that_is_listed_twice_is_counted_once(prefixes, blend):
    one = blend.datasets[0]
    assert Ledger(NextToken(Blend([one, one], [1, 1], 40))).read(40) == {prefixes[0]: (40, 280)}


# --- going on


def mixture(train, phases=(), num_samples=150, seed=11, **fields):
    return NextToken(build_mixture(section(train, phases, **fields), 7, num_samples, seed))


def saved(dataset, consumed):
    return json.loads(json.dumps(Ledger(dataset).state(consumed)))["ledger"]


def said(caplog, act):
    logger = logging.getLogger("engine.data.ledger")
    logger.addHandler(caplog.handler)
    try:
        act()
    finally:
        logger.removeHandler(caplog.handler)
    return caplog.text


def test_a_mixture_that_changes_from_here_on_is_no_other_history(prefixes, caplog):
    a, b, c = prefixes
    then = saved(mixture(["1", a, "1", b]), 60)
    now = mixture(["1", a, "1", b], [(60 * 7, 0, ["1", c])])
    now.samples = kept(now.samples, then["orders"], 150, None)
    ledger = Ledger(now)
    assert said(caplog, lambda: ledger.check(then, is_same_run=True)) == ""
    assert ledger.read(70) == {a: (30, 210), b: (30, 210), c: (10, 70)}


@pytest.mark.parametrize("consumed", [1, 10, 60])
def test_a_mixture_that_changes_before_is_refused(prefixes, consumed):
    a, b, c = prefixes
    ledger = Ledger(mixture(["1", a, "1", b], [(3 * 7, 0, ["1", c])] if consumed > 3 else [], **({} if consumed > 3 else {"replay": ["1", b], "replay_share": 0.9})))
    then = saved(mixture(["1", a, "1", b]), consumed)
    if consumed == 60:
        with pytest.raises(DataError, match=r"first 60 samples were read from \(.*a: 30 read, 2 by this configuration; .*b: 30 read, 1 .*c: 0 read, 57 .*data.phases"):
            ledger.check(then, is_same_run=True)
    else:
        with pytest.raises(DataError, match=rf"first {consumed} samples were read from"):
            ledger.check(then, is_same_run=True)


def test_another_run_goes_on_and_its_ledger_keeps_what_was_read(prefixes, caplog):
    a, b, c = prefixes
    then = saved(mixture(["1", a]), 20)
    ledger = Ledger(mixture(["1", b, "1", c]))
    text = said(caplog, lambda: ledger.check(then, is_same_run=False))
    ledger.begin(20, then, is_same_run=False)
    assert "a: 20 read, 0 by this configuration" in text and "The run goes on" in text
    assert {name: pair for name, pair in ledger.read(20).items() if pair[0]} == {a: (20, 140)}
    assert ledger.read(30) == {a: (20, 140), b: (5, 35), c: (5, 35)}
    again = Ledger(mixture(["1", b, "1", c]))  # a checkpoint of that run, whose own configuration does not account for the first 20
    state = json.loads(json.dumps(ledger.state(30)))["ledger"]
    again.check(state, is_same_run=True)
    again.begin(30, state, is_same_run=True)
    assert again.read(40) == {a: (20, 140), b: (10, 70), c: (10, 70)}


def test_a_run_that_is_over_before_is_not_judged(prefixes):
    a, b, _ = prefixes
    ledger = Ledger(mixture(["1", a, "1", b], num_samples=20))
    ledger.check(saved(mixture(["1", a, "1", b]), 60), is_same_run=True)
    ledger.begin(60, saved(mixture(["1", a, "1", b]), 60), is_same_run=True)


def test_corpora_that_were_moved_are_the_same(prefixes, tmp_path, caplog):
    a, b, _ = prefixes
    moved = []
    for prefix in (a, b):
        moved.append(str(tmp_path / ("new_" + prefix[-1])))
        for ending in (".bin", ".idx"):
            (tmp_path / (moved[-1] + ending)).symlink_to(prefix + ending)
    ledger = Ledger(mixture(["1", moved[0], "1", moved[1]]))
    assert said(caplog, lambda: ledger.check(saved(mixture(["1", a, "1", b]), 60), is_same_run=True)) == ""
    assert ledger.read(60) == {moved[0]: (30, 210), moved[1]: (30, 210)}


@pytest.mark.parametrize("change", ["seed", "corpus"])
def test_another_order_within_the_sources_is_told(prefixes, caplog, change):
    a, b, _ = prefixes
    then = saved(mixture(["1", a, "1", b]), 60)
    if change == "corpus":
        then["orders"][b]["tokens"] += 9
    now = mixture(["1", a, "1", b], seed=12 if change == "seed" else 11)
    text = said(caplog, lambda: Ledger(now).check(then, is_same_run=True))
    assert "come in another order" in text and b in text and (a in text) == (change == "seed")


def numbered(samples, consumed):
    """The rows of each source among the first `consumed` samples, in order."""
    rows = samples.gather(np.arange(consumed))
    numbers = source_numbers(samples, np.arange(consumed))
    return {name: rows[numbers == k] for k, name in enumerate(names_of(samples))}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(150, 500), st.integers(0, 1), st.integers(1, 300))
def test_a_longer_run_or_a_new_phase_keeps_every_order(prefixes, cut, longer, kind, again):
    """Twice in a row: what was read stays what it was, and each source goes on with what it has not given yet, epoch by epoch."""
    a, b, c = prefixes
    plan = [(cut * 7 + 1, 50, ["9", c, "1", a])] if kind else []
    first = mixture(["3", a, "2", b, "1", c])
    orders = saved(first, cut)["orders"]
    second = kept(mixture(["3", a, "2", b, "1", c], plan, num_samples=longer).samples, orders, longer, None)
    third_orders = saved(NextToken(second), longer)["orders"]
    third = kept(mixture(["3", a, "2", b, "1", c], plan, num_samples=longer + again).samples, third_orders, longer + again, None)
    assert np.array_equal(second.gather(np.arange(cut)), first.samples.gather(np.arange(cut)))
    assert np.array_equal(third.gather(np.arange(longer)), second.gather(np.arange(longer)))
    for name, rows in numbered(third, longer + again).items():
        source = third.datasets[names_of(third).index(name)]
        assert np.array_equal(rows, source.gather(np.arange(len(rows))))
        pieces = order_of(source)["pieces"]
        assert len({seed for seed, _, _ in pieces}) == len(pieces) and (len(pieces) == 1 or isinstance(source, Chained))
    source = third.datasets[2]
    times = Counter(place for i in range(len(source)) for place in inputs_of(source, i))
    assert max(times.values()) <= sum(epochs for _, epochs, _ in order_of(source)["pieces"])


def inputs_of(source, i):
    """(document, token) of what a sample feeds to the network; its last token is a label only."""
    return [(document, offset + t) for document, offset, count in source.documents_of(i) for t in range(count)][:-1]


def test_a_lone_corpus_goes_on_behind_its_first_epoch(prefixes, tmp_path):
    corpus = IndexedCorpus(prefixes[0])
    one, two = (GPTSamples(corpus, np.arange(60), n, 7, 1, "train") for n in (70, 150))  # 77 samples an epoch
    orders = {prefixes[0]: order_of(one)}
    longer = kept(two, orders, 150, str(tmp_path))
    assert not np.array_equal(one.gather(np.arange(70)), two.gather(np.arange(70)))  # what Megatron does
    assert np.array_equal(one.gather(np.arange(77)), longer.gather(np.arange(77))) and len(longer) >= 150
    assert order_of(longer)["pieces"] == [[1, 1, None], [2, 1, None]]
    shorter = kept(one, {prefixes[0]: order_of(two)}, 70, None)
    assert np.array_equal(shorter.gather(np.arange(70)), two.gather(np.arange(70)))
    assert kept(two, {prefixes[0]: order_of(two)}, 150, None) is two


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 149), st.sampled_from([{}, {"max_epochs": {"*": 1.5}}, {"phases": True}]))
def test_any_cut_of_a_run_reads_the_same_samples(prefixes, cut, change):
    """Two processes, of which the second knows only the position, against one; and their ledgers agree."""
    a, b, c = prefixes
    change = dict(change)
    phases = [(200, 140, ["1", b, "2", c]), (700, 0, ["1", a])] if change.pop("phases", False) else []
    whole, first, second = (mixture(["3", a, "2", b, "1", c], phases, num_samples=150, **change) for _ in range(3))
    rows = [first.batch(np.arange(cut))["tokens"], second.batch(np.arange(cut, 150))["tokens"]]
    assert np.array_equal(np.concatenate(rows), whole.batch(np.arange(150))["tokens"])
    ledger = Ledger(second)
    ledger.begin(cut, saved(first, cut) if cut else None, is_same_run=True)
    assert ledger.read(150) == Ledger(whole).read(150)
