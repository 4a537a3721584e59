"""Mixtures: indices and sample order equal to megatron-core's builder, parsing of blend lists, refusals."""

import numpy as np
import pytest

from engine import _csrc
from engine.data.blend import Blend, build_pretraining, build_pretraining_per_split, normalize, parse_blend
from engine.data.indexed import DataError
from engine.data.pretraining import GPTSamples


def random_weights(random):
    count = int(random.integers(1, 12))
    kind = random.integers(3)
    if kind == 0:
        return random.uniform(0.01, 1, count)
    if kind == 1:
        return random.integers(1, 4, count).astype(float)  # many ties
    return np.full(count, 1.0)


def test_blending_indices_equal_megatrons(megatron):
    random = np.random.default_rng(0)
    for _ in range(200):
        weights, size = normalize(random_weights(random)), int(random.integers(0, 400))
        dataset, sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        megatron.helpers.build_blending_indices(dataset, sample, np.array(weights), len(weights), size, False)
        ours = _csrc.blending_indices(weights, size)
        assert [a.dtype for a in ours] == [np.int16, np.int64]
        assert np.array_equal(ours[0], dataset) and np.array_equal(ours[1], sample)
        assert all(abs((dataset == k).sum() - w * size) <= 1 + 1e-9 for k, w in enumerate(weights))


def test_exhaustive_blending_indices_equal_megatrons(megatron):
    random = np.random.default_rng(1)
    for _ in range(200):
        sizes = random.integers(1, random.choice([3, 90]), size=int(random.integers(1, 9)))
        dataset, sample = np.zeros(sizes.sum(), dtype=np.int16), np.zeros(sizes.sum(), dtype=np.int64)
        megatron.helpers.build_exhaustive_blending_indices(dataset, sample, sizes, len(sizes))
        ours = _csrc.exhaustive_blending_indices(sizes.tolist())
        assert np.array_equal(ours[0], dataset) and np.array_equal(ours[1], sample)


def test_at_most_32767_datasets():
    assert _csrc.blending_indices([1 / 32767] * 32767, 1)[0].tolist() == [0]
    with pytest.raises(DataError, match="32768 datasets; expected 1 to 32767"):
        _csrc.blending_indices([1 / 32768] * 32768, 1)
    with pytest.raises(DataError, match="a blend of 0 datasets"):
        _csrc.exhaustive_blending_indices([])


LISTS = [["a"], ["a", "b"], ["a", "b", "c"], ["0.3", "a"], ["30", "a", "70", " b "], ["1e-3", "x", "2", "y"], ["0.3", "a", "0.7"], ["x1", "2"]]


@pytest.mark.parametrize("items", LISTS)
def test_parse_blend_equals_megatrons(megatron, items):
    from megatron.core.datasets.utils import get_blend_from_list

    assert parse_blend(items) == get_blend_from_list(items)


@pytest.mark.parametrize(
    "items, words", [([], "empty"), (["1", "a", "b", "c"], "'b' stands where a weight"), (["a", "b", "1", "c"], "'a' stands"),
                     (["0", "a", "1", "b"], "weight 0.0"), (["-1", "a"], "weight -1.0"), (["nan", "a"], "weight nan")]
)  # fmt: skip
def test_parse_blend_refuses(items, words):
    with pytest.raises(DataError, match=words):
        parse_blend(items)


# --- the builder


def megatron_build(megatron, megatron_config, seq_len, seed, num_samples, **fields):
    builder = megatron.builder.BlendedMegatronDatasetBuilder
    return builder(megatron.gpt.GPTDataset, list(num_samples), lambda: True, megatron_config(seq_len, seed, **fields)).build()


def assert_same_samples(ours, theirs):
    assert (ours is None) == (theirs is None)
    if ours is None:
        return
    assert len(ours) == len(theirs)
    text = ours.gather(np.arange(len(ours)))
    assert np.array_equal(text[:, :-1], np.stack([theirs[j]["tokens"].numpy() for j in range(len(ours))]))
    assert np.array_equal(text[:, 1:], np.stack([theirs[j]["labels"].numpy() for j in range(len(ours))]))
    if isinstance(ours, Blend):
        assert np.array_equal(ours.dataset_index, theirs.dataset_index)
        assert np.array_equal(ours.dataset_sample_index, theirs.dataset_sample_index)


def corpora(make_corpus, random, count):
    names = [f"c{k}" for k in range(count)]
    made = [make_corpus(random.integers(0, 60, size=int(random.integers(40, 90))), name, seed=k) for k, name in enumerate(names)]
    return [corpus.prefix for corpus in made]


def test_weighted_blends_equal_megatrons(make_corpus, megatron, megatron_config):
    random = np.random.default_rng(2)
    for trial in range(12):
        prefixes = corpora(make_corpus, random, int(random.integers(1, 6)))
        weights = [round(float(w), 3) for w in random.uniform(0.1, 2, len(prefixes))]
        split = ["8,1,1", "1,1,1", "9,1", "1", "0.5,0.2,0.3"][trial % 5]
        num_samples = [int(random.integers(1, 300)) if i <= split.count(",") else 0 for i in range(3)]
        seq_len, seed = int(random.integers(2, 30)), int(random.integers(2**31))
        ours = build_pretraining([x for pair in zip(map(str, weights), prefixes) for x in pair], split, seq_len, num_samples, seed)
        theirs = megatron_build(megatron, megatron_config, seq_len, seed, num_samples, blend=(prefixes, weights), split=split)
        for a, b, wanted in zip(ours, theirs, num_samples):
            if wanted:
                assert_same_samples(a, b)
                assert len(a) >= wanted
            else:
                assert a is None


@pytest.mark.parametrize("num_samples", [[40, 10, 5], [None, None, None], [10**6, 10, 5]])
@pytest.mark.parametrize("count", [1, 3])
def test_plain_prefixes_equal_megatrons(make_corpus, megatron, megatron_config, count, num_samples):
    if count == 1 and num_samples[0] == 10**6:
        num_samples = [2000, 10, 5]  # a lone corpus repeats, several are capped at one pass
    prefixes = corpora(make_corpus, np.random.default_rng(3), count)
    ours = build_pretraining(prefixes, "8,1,1", 9, num_samples, 11)
    theirs = megatron_build(megatron, megatron_config, 9, 11, num_samples, blend=(prefixes, None), split="8,1,1")
    for a, b in zip(ours, theirs):
        assert_same_samples(a, b)
    assert isinstance(ours[0], GPTSamples if count == 1 else Blend)


def test_a_lone_corpus_with_a_weight_equals_megatrons(make_corpus, megatron, megatron_config):
    (prefix,) = corpora(make_corpus, np.random.default_rng(9), 1)
    ours = build_pretraining(["0.5", prefix], "8,1,1", 9, [300, 40, 3], 11)
    theirs = megatron_build(megatron, megatron_config, 9, 11, [300, 40, 3], blend=([prefix], [0.5]), split="8,1,1")
    for a, b in zip(ours, theirs):
        assert_same_samples(a, b)
    assert len(ours[0]) == 300 and isinstance(ours[0], Blend)


@pytest.mark.parametrize("lone_weight", [False, True])
def test_one_blend_per_split_equals_megatrons(make_corpus, megatron, megatron_config, lone_weight):
    a, b, c, d = corpora(make_corpus, np.random.default_rng(4), 4)
    train = ["0.7", a, "0.3", b]
    valid = ["2", c] if lone_weight else [c]
    ours = build_pretraining_per_split([train, valid, None], 9, [300, 40, 0], 11)
    per_split = [parse_blend(train), parse_blend(valid), None]
    theirs = megatron_build(megatron, megatron_config, 9, 11, [300, 40, 0], blend_per_split=per_split)
    for x, y in zip(ours, theirs):
        assert_same_samples(x, y)
    ours = build_pretraining_per_split([[a, b], None, [c, d]], 9, [None, 0, 30], 11)
    theirs = megatron_build(megatron, megatron_config, 9, 11, [None, 0, 30], blend_per_split=[([a, b], None), None, ([c, d], None)])
    for x, y in zip(ours, theirs):
        assert_same_samples(x, y)


def test_surplus_lets_a_share_round_up(make_corpus):
    prefixes = corpora(make_corpus, np.random.default_rng(5), 3)
    train, _, _ = build_pretraining(["1", prefixes[0], "1", prefixes[1], "1", prefixes[2]], "1", 9, [1000, 0, 0], 1)
    assert len(train) == 3 * 334
    assert all(len(dataset) >= 336 for dataset in train.datasets)  # ceil(334 * 1.005)


def test_blend_gathers_segments_and_names_its_sources(make_corpus):
    prefixes = corpora(make_corpus, np.random.default_rng(6), 3)
    train, _, _ = build_pretraining(["1", prefixes[0], "2", prefixes[1], "3", prefixes[2]], "1", 9, [200, 0, 0], 1)
    numbers = np.random.default_rng(7).permutation(200)
    tokens, segments = train.gather(numbers, segments=True)
    assert np.array_equal(tokens, train.gather(numbers))
    for row, j in enumerate(numbers):
        k, sample = train.source_of(j)
        parts = train.documents_of(j)
        corpus = train.datasets[k].corpus
        assert tokens[row].tolist() == [t for d, offset, n in parts for t in corpus.get(d, offset, n).tolist()]
        assert np.array_equal(segments[row], train.datasets[k].gather(np.array([sample]), segments=True)[1][0])


def test_cache_serves_the_whole_builder(make_corpus, tmp_path):
    prefixes = corpora(make_corpus, np.random.default_rng(8), 2)
    build = lambda cache: build_pretraining(["1", prefixes[0], "2", prefixes[1]], "8,2", 9, [200, 20, 0], 1, cache)  # noqa: E731
    plain, first, second = build(None), build(tmp_path / "cache"), build(tmp_path / "cache")
    for a, b, c in list(zip(plain, first, second))[:2]:
        assert np.array_equal(a.gather(np.arange(20)), b.gather(np.arange(20)))
        assert np.array_equal(a.gather(np.arange(20)), c.gather(np.arange(20)))


# --- refusals


def samples_of(make_corpus, name, num_documents, seq_len=7):
    return GPTSamples(make_corpus([9] * num_documents, name), np.arange(num_documents), None, seq_len, 1, "train")


def test_blend_that_outruns_a_dataset_is_refused(make_corpus):
    a, b = samples_of(make_corpus, "a", 20), samples_of(make_corpus, "b", 20)  # 25 samples each
    assert len(Blend([a, b], [1, 1], 50)) == 50
    with pytest.raises(DataError, match=r"a \(train\): the blend draws 26 samples, but only 25 were built; lower its weight"):
        Blend([a, b], [1, 1], 52)


def test_blend_refuses_what_cannot_be_mixed(make_corpus):
    a, b = samples_of(make_corpus, "a", 20), samples_of(make_corpus, "b", 20)
    with pytest.raises(DataError, match=r"seq_len \[7, 8\]"):
        Blend([a, samples_of(make_corpus, "c", 20, seq_len=8)], [1, 1], 10)
    for weights, words in [([1], "1 weights for 2"), ([1, 0], "positive"), ([1, float("nan")], "positive"), (None, "0 weights for 2")]:
        with pytest.raises(DataError, match=words):
            Blend([a, b], weights, 10)
    with pytest.raises(DataError, match="num_samples is -1"):
        Blend([a, b], [1, 1], -1)
    with pytest.raises(DataError, match="there are 10"):
        Blend([a, b], [1, 1], 10).gather(np.array([10]))


def test_exhaustive_blend_refuses_a_dataset_without_samples(make_corpus):
    empty = GPTSamples(make_corpus([3], "e"), np.arange(1), 0, 7, 1, "train")
    assert len(empty) == 0
    with pytest.raises(DataError, match=r"e \(train\) has 0 samples"):
        Blend([samples_of(make_corpus, "a", 20), empty], None, None)


def test_builder_refuses_splits_without_documents(make_corpus):
    prefix = make_corpus([90] * 5).prefix
    with pytest.raises(DataError, match="split '969,30,1' leaves 0 of 5 documents for valid"):
        build_pretraining([prefix], "969,30,1", 7, [10, 4, 0], 1)
    with pytest.raises(DataError, match="leaves 0 of 5 documents for test"):
        build_pretraining([prefix], "100", 7, [10, 0, 4], 1)
    train, valid, test = build_pretraining([prefix], "969,30,1", 7, [10, 0, 0], 1)
    assert len(train) >= 10 and valid is None and test is None
    with pytest.raises(DataError, match="4 valid samples are asked for, but no valid data is given"):
        build_pretraining_per_split([[prefix], None, None], 7, [10, 4, 0], 1)


def test_builder_refuses_weights_without_a_number(make_corpus):
    prefix = make_corpus([90] * 5).prefix
    with pytest.raises(DataError, match="needs a number of samples"):
        build_pretraining(["1", prefix, "2", prefix], "1", 7, [None, 0, 0], 1)


def test_one_epoch_reaches_every_dataset(make_corpus):
    prefixes = [make_corpus([9] * 20, name).prefix for name in "ab"]  # 25 samples each
    blend = ["1", prefixes[0], "1", prefixes[1]]
    train, _, _ = build_pretraining(blend, "1", 7, [50, 0, 0], 1, one_epoch=True)
    assert len(train) == 50  # the surplus does not count as a second epoch
    with pytest.raises(DataError, match="holds 25 samples of 7 tokens in one epoch, but 26"):
        build_pretraining(blend, "1", 7, [52, 0, 0], 1, one_epoch=True)
