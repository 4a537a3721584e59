"""Laws of the data order on random inputs: shuffles, corpora, loaders, blends, mixtures and packing.

What is compared with: numpy's own shuffle, megatron-core's compiled helpers, plain loops that look at everything, and counting.
Every token of these corpora is its own place in the corpus, so that a sample tells where it comes from.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine import _csrc
from engine.data.blend import build_pretraining, build_pretraining_per_split, normalize
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter
from engine.data.loader import Loader
from engine.data.mixture import course
from engine.data.pack import Order
from engine.data.pretraining import GPTSamples, split_documents
from engine.data.text import NextToken

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=100, deadline=None)

# --- shuffles


@MANY
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 4000), used=st.integers(0, 1300), dtype=st.sampled_from(["int32", "uint32", "int64", "uint64"]))
@example(seed=0, size=2, used=623, dtype="uint32")      # the last word of a block
@example(seed=0, size=1, used=0, dtype="int64")         # draws nothing
@example(seed=5, size=2**16 + 1, used=0, dtype="int32")  # every width of the mask
def test_shuffle_equals_numpys_and_leaves_its_state(seed, size, used, dtype):
    theirs = np.random.RandomState(seed)
    theirs.randint(0, 2**32, used, dtype=np.uint32)
    name, words, position, *rest = theirs.get_state()
    expected = np.arange(size, dtype=dtype)
    values = expected.copy()
    theirs.shuffle(expected)
    position = _csrc.shuffle(values, words, position)
    assert values.dtype == dtype and np.array_equal(values, expected)
    ours = np.random.RandomState()
    ours.set_state((name, words, position, *rest))
    assert position == theirs.get_state()[2] and np.array_equal(words, theirs.get_state()[1])
    assert np.array_equal(ours.randint(0, 2**63, 700), theirs.randint(0, 2**63, 700))


@pytest.mark.parametrize("values, error", [
    (np.zeros(4, np.int16), TypeError), (np.zeros(4), TypeError), (np.zeros((2, 2), np.int32), TypeError), (np.zeros(8, np.int32)[::2], TypeError),
    (np.broadcast_to(np.int32(0), 4), TypeError), (np.frombuffer(b"12345678", np.int32), ValueError),
], ids=["int16", "float", "matrix", "strided", "broadcast", "read-only"])  # fmt: skip
def test_shuffle_takes_no_other_arrays(values, error):
    with pytest.raises(error):
        _csrc.shuffle(values, np.zeros(624, np.uint32), 624)


@pytest.mark.parametrize("num_words, position", [(623, 0), (624, -1), (624, 625)])
def test_shuffle_takes_no_other_state(num_words, position):
    with pytest.raises(ValueError, match="624 words and a position"):
        _csrc.shuffle(np.arange(4), np.zeros(num_words, np.uint32), position)


# --- the samples of a corpus


def write_corpus(folder, name: str, lengths) -> IndexedCorpus:
    places = itertools.count()
    with IndexedWriter(folder / name, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.array(list(itertools.islice(places, length)), dtype=np.int32))
    return IndexedCorpus(folder / name)


document_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)
seeds, seq_lens = st.integers(0, 2**32 - 1), st.integers(1, 40)


@FEW
@given(lengths=document_lengths, seq_len=seq_lens, seed=seeds, share=st.floats(0.1, 3.9))
def test_every_token_comes_once_in_an_epoch(tmp_path_factory, lengths, seq_len, seed, share):
    corpus, total = write_corpus(tmp_path_factory.mktemp("c"), "c", lengths), sum(lengths)
    samples = GPTSamples(corpus, range(len(lengths)), max(1, int(share * total / seq_len)), seq_len, seed, "train")
    epochs, before = samples.plan.num_epochs, samples.plan.num_samples_before_final
    assert sorted(samples.shuffle_index.tolist()) == list(range(len(samples)))
    texts = samples.gather(np.arange(len(samples)))

    in_order = np.empty_like(texts)
    in_order[samples.shuffle_index] = texts
    assert np.array_equal(in_order[:-1, -1], in_order[1:, 0])           # neighbours share one token
    counts = np.bincount(in_order[:, :-1].ravel(), minlength=total)     # every token is an input, and one input only
    assert counts.max() <= epochs and 0 < epochs * total - counts.sum() <= seq_len
    if before is not None:                                              # a final epoch of its own comes last, and repeats nothing within itself
        first = np.bincount(texts[:before, :-1].ravel(), minlength=total)
        assert first.max() <= epochs - 1 and 0 < (epochs - 1) * total - first.sum() <= seq_len
    for j in range(len(samples)):                                       # a sample is whole documents, but for its ends
        parts = samples.documents_of(j)
        starts = np.cumsum([0, *lengths])
        assert texts[j].tolist() == [starts[d] + offset + i for d, offset, n in parts for i in range(n)]


@FEW
@given(lengths=st.lists(st.integers(1, 30), min_size=3, max_size=40), seq_len=st.integers(1, 12), seed=seeds,
       split=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), wanted=st.integers(1, 60))
def test_no_sample_crosses_a_split(tmp_path_factory, lengths, seq_len, seed, split, wanted):
    folder, text = tmp_path_factory.mktemp("c"), ",".join(map(str, split))
    write_corpus(folder, "c", lengths)
    ranges = split_documents(len(lengths), text)
    if min(map(len, ranges)) == 0:
        return
    starts = np.cumsum([0, *lengths])
    for samples, documents in zip(build_pretraining([str(folder / "c")], text, seq_len, (wanted,) * 3, seed), ranges, strict=True):
        texts = samples.gather(np.arange(len(samples)))
        assert starts[documents.start] <= texts.min() and texts.max() < starts[documents.stop]
        assert {d for j in range(len(samples)) for d, _, _ in samples.documents_of(j)} <= set(documents)


@FEW
@given(seed=seeds, first=st.integers(3, 20), chosen=st.integers(1, 10))
def test_a_range_is_the_array_of_its_numbers(tmp_path_factory, seed, first, chosen):
    """A split is kept as a range; the same documents in an array, and with one more that breaks the range, go the general way."""
    corpus = write_corpus(tmp_path_factory.mktemp("c"), "c", [7] * 40)
    build = lambda documents: GPTSamples(corpus, documents, 30, 4, seed, "train")  # noqa: E731
    a, b = build(range(first, first + chosen)), build(np.arange(first, first + chosen))
    assert a.documents == b.documents == range(first, first + chosen)
    c = build(np.array([*range(first, first + chosen), 1]))
    assert isinstance(c.documents, np.ndarray) and set(c.document_index.tolist()) == {*range(first, first + chosen), 1}
    for x, y in zip((a.document_index, a.sample_index, a.shuffle_index), (b.document_index, b.sample_index, b.shuffle_index)):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    assert set(a.document_index.tolist()) == set(range(first, first + chosen))


def test_the_sample_index_counts_what_it_was_told():
    lengths, documents = np.array([3, 4], np.int32), np.array([1, 0], np.int32)
    assert _csrc.sample_index_int32(lengths, documents, 2, 7).tolist() == _csrc.sample_index_int32(lengths, documents, 2).tolist()
    for wrong in (6, 8):
        with pytest.raises(ValueError, match=f"documents of 7 tokens, but num_tokens is {wrong}"):
            _csrc.sample_index_int32(lengths, documents, 2, wrong)
    with pytest.raises(DataError, match="hold no 4 samples of 2"):
        _csrc.sample_index_int32(lengths, documents, 2, 9)
    with pytest.raises(IndexError, match="document 2 of 2"):
        _csrc.sample_index_int32(lengths, documents + 1, 2, 7)


# --- the loader


@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    """A blend of three corpora whose tokens are their places."""
    folder = tmp_path_factory.mktemp("blend")
    items = []
    for k, weight in enumerate((0.5, 0.3, 0.2)):
        write_corpus(folder, f"c{k}", np.random.default_rng(k).integers(0, 60, 40).tolist())
        items += [str(weight), str(folder / f"c{k}")]
    train, _, _ = build_pretraining_per_split((items, None, None), 9, (700, 0, 0), 3)
    return NextToken(train)


@FEW
@given(first=st.integers(0, 300), runs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), max_size=4))
def test_any_ranks_resumed_anywhere_read_the_unbroken_run(blended, first, runs):
    """Each run is (dp, micro_batch, micro-batches of a step, steps); the next goes on where it ended, with other ranks and another batch."""
    read, at = [], first
    for dp, micro_batch, num_microbatches, steps in runs:
        global_batch = dp * micro_batch * num_microbatches
        for _ in range(steps):
            ranks = [Loader(blended, micro_batch, rank, dp).batches(at, global_batch) for rank in range(dp)]
            read += [rank[m]["tokens"].numpy() for m in range(num_microbatches) for rank in ranks]
            at += global_batch
    unbroken = [batch["tokens"].numpy() for k in range(first, at) for batch in Loader(blended, 1, 0, 1).batches(k, 1)]
    assert np.array_equal(np.concatenate(read or [np.empty((0, 9))]), np.concatenate(unbroken or [np.empty((0, 9))]))


# --- blends


def megatron_blend(megatron, weights, size):
    dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    megatron.helpers.build_blending_indices(dataset, sample, np.array(weights, dtype=np.float64), len(weights), size, False)
    return dataset, sample


def assert_equal_indices(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), np.flatnonzero(a != b)[:1]


positive = st.floats(1e-9, 1) | st.sampled_from([1e-300, 1e-12, 1.0, 2.0, 3.0]) | st.integers(1, 9).map(float)
raw_weights = st.lists(positive, min_size=1, max_size=70) | st.integers(1, 70).map(lambda n: [1.0] * n) | st.integers(1, 70).map(lambda n: [*range(1, n + 1)])


@MANY
@given(raw=raw_weights, size=st.integers(0, 4000), zeros=st.integers(0, 3))
def test_blends_equal_megatrons(megatron, raw, size, zeros):
    weights = [0.0] * zeros + normalize(raw)
    ours = _csrc.blending_indices(weights, size)
    assert_equal_indices(ours, megatron_blend(megatron, weights, size))
    for k, weight in enumerate(weights):
        drawn = ours[1][ours[0] == k]
        assert drawn.tolist() == list(range(drawn.size))                                    # nothing repeated, nothing lost
        assert weight * size - sum(1 / n for n in range(1, len(weights) + 1)) - 1e-6 <= drawn.size <= weight * size + 1 + 1e-6


# Names of weights of n sources: those of a power law keep few sources alive, ranks and thirds meet in ties again and again.
SHAPES = {
    "random": lambda n: np.random.default_rng(0).dirichlet(np.ones(n)),
    "ranks": lambda n: np.arange(1, n + 1),
    "thirds": lambda n: np.repeat([1, 2, 4], n)[:n * 3:3],
    "power law": lambda n: 1 / np.arange(1, n + 1) ** 2,
    "tiny beside large": lambda n: np.where(np.arange(n) % 50 == 0, 1.0, 1e-12 * (1 + np.arange(n))),
    "neighbours": lambda n: 1 + np.arange(n) * 2.0**-52,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_sources, size", [(33, 60_000), (500, 30_000), (32767, 300)])
def test_long_blends_equal_megatrons(megatron, name, num_sources, size):
    weights = normalize(SHAPES[name](num_sources))
    assert_equal_indices(_csrc.blending_indices(weights, size), megatron_blend(megatron, weights, size))


@MANY
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=70) | st.lists(st.sampled_from([1, 7, 7, 400]), min_size=1, max_size=50))
def test_exhaustive_blends_equal_megatrons(megatron, sizes):
    dataset, sample = np.zeros(sum(sizes), dtype=np.int16), np.zeros(sum(sizes), dtype=np.int64)
    megatron.helpers.build_exhaustive_blending_indices(dataset, sample, np.array(sizes), len(sizes))
    assert_equal_indices(_csrc.exhaustive_blending_indices(sizes), (dataset, sample))


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_blends_refuse_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="a weight is"):
        _csrc.blending_indices([0.5, weight], 3)


# --- mixtures


def plain_draw(path, size):
    """The rule of csrc/mixture.hpp by a loop over all sources, in the same order of roundings."""
    num_sources = path.weights.shape[2]
    before, counts, sources, samples = np.zeros(num_sources), np.zeros(num_sources, np.int64), [], []
    ends = [*path.firsts[1:].tolist(), max(size, int(path.firsts[-1]) + 1)]
    for first, end, (begin, to) in zip(path.firsts.tolist(), ends, path.weights):
        curve = (to - begin) / (2 * (end - first))
        at = lambda t: before + (begin * t + curve * t * t)  # noqa: E731, B023
        for i in range(first, min(end, size)):
            lags = np.where((begin == 0) & (to == 0), -np.inf, at(max(i, 1) - first) - counts)
            sources.append(int(lags.argmax()))
            samples.append(counts[sources[-1]])
            counts[sources[-1]] += 1
        before = at(end - first)
    return np.array(sources, dtype=np.int16), np.array(samples, dtype=np.int64)


@st.composite
def courses(draw):
    """Up to five mixtures of up to 60 sources: some weights zero, some equal, some kept from one mixture to the next."""
    num_sources = draw(st.integers(1, 60))
    random, mixtures, first = np.random.default_rng(draw(st.integers(0, 2**32))), [], 0
    for k in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["any", "equal", "some", "ranks"]))
        weights = {"any": random.uniform(0.01, 1, num_sources), "equal": np.ones(num_sources), "ranks": 1.0 + random.permutation(num_sources),
                   "some": (random.random(num_sources) < 0.5) * random.integers(1, 4, num_sources).astype(float)}[kind]
        weights = np.ones(num_sources) if weights.sum() == 0 else weights
        ramp = draw(st.sampled_from([0, 1, 37, 200])) if k else 0
        mixtures.append((first, ramp, normalize(weights)))
        first += ramp + draw(st.integers(1, 250))
    return SimpleNamespace(path=course(mixtures), size=draw(st.integers(0, first + 100)))


@settings(MANY, max_examples=80)
@given(courses())
def test_mixtures_equal_a_plain_loop_and_lose_nothing(case):
    source, sample = case.path.draw(case.size)
    assert_equal_indices((source, sample), plain_draw(case.path, case.size))
    num_sources = case.path.weights.shape[2]
    counts = np.bincount(source, minlength=num_sources)
    for k in range(num_sources):                    # through every change of weights
        assert sample[source == k].tolist() == list(range(counts[k]))
    for first, end, weights in zip(case.path.firsts, [*case.path.firsts[1:], case.size], case.path.weights):
        assert not set(np.flatnonzero(weights.max(axis=0) == 0)) & set(source[first:end].tolist())


# --- packing


@MANY
@given(data=st.data(), capacity=st.integers(1, 4000))
def test_packing_loses_nothing_and_overfills_no_row(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity) | st.integers(1, min(capacity, 7)), max_size=300))
    documents, starts = _csrc.pack_best_fit(np.array(lengths, dtype=np.int32), capacity)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()
    fills = [sum(lengths[i] for i in documents[begin:end].tolist()) for begin, end in zip(starts, starts[1:])]
    assert all(fill <= capacity for fill in fills)
    assert all(a + b > capacity for a, b in itertools.combinations(sorted(fills)[:2], 2))   # no two rows would have fitted into one


@FEW
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_rows_come_once_in_an_epoch_of_their_source(sizes, data):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes))) if len(sizes) > 1 else None
    order = Order(sizes, weights, 80, 11, False, [str(k) for k in range(len(sizes))])
    places = order.where(np.arange(80))
    for source, size in enumerate(sizes):
        items = [item for k, item in places if k == source]
        for begin in range(0, len(items) - size + 1, size):
            assert sorted(items[begin:begin + size]) == list(range(size))
    assert order.where(np.arange(30, 80)) == places[30:]                    # resumed at sample 30
