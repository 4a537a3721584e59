"""Sample order and tokens of one corpus: bit equality with megatron-core, the cache, traceability, refusals."""

import multiprocessing
import os

import numpy as np
import pytest

from engine import _csrc
from engine.data.indexed import DataError
from engine.data.pretraining import GPTSamples, plan_epochs, split_documents, split_shares


def random_lengths(random, count=None):
    """Document lengths with many empty and one-token documents: the places where boundaries go wrong."""
    count = int(random.integers(1, 40)) if count is None else count
    lengths = random.integers(0, random.choice([2, 5, 60]), size=count)
    lengths[random.integers(count)] += random.integers(1, 100)
    return lengths.astype(np.int32)


@pytest.mark.parametrize("name", ["int32", "int64"])
def test_sample_index_equals_megatron_on_random_corpora(megatron, name):
    random = np.random.default_rng(0)
    for _ in range(300):
        lengths = random_lengths(random)
        num_epochs, seq_len = int(random.integers(1, 4)), int(random.integers(1, 50))
        documents = np.tile(np.arange(lengths.size, dtype=np.int32), num_epochs)
        random.shuffle(documents)
        total = int(lengths.sum())
        if num_epochs * total <= 1:
            continue
        ours = getattr(_csrc, f"sample_index_{name}")(lengths, documents, seq_len)
        theirs = getattr(megatron.helpers, f"build_sample_idx_{name}")(lengths, documents, seq_len, num_epochs, total, True, 1)
        assert ours.dtype == np.dtype(name) == theirs.dtype
        assert np.array_equal(ours, theirs), (lengths, documents, seq_len)


def test_sample_index_counts_beyond_int32_tokens(megatron):
    lengths = np.full(3, 2**31 - 1, dtype=np.int32)
    documents = np.array([2, 0, 1], dtype=np.int32)
    ours = _csrc.sample_index_int32(lengths, documents, 2**20)
    theirs = megatron.helpers.build_sample_idx_int32(lengths, documents, 2**20, 1, int(lengths.sum(dtype=np.int64)), True, 1)
    assert np.array_equal(ours, theirs) and ours.shape[0] == 6144


def test_sample_index_takes_no_wrong_arrays():
    lengths, documents = np.array([3, 4], dtype=np.int32), np.array([0, 1], dtype=np.int32)
    with pytest.raises(TypeError):
        _csrc.sample_index_int32(lengths.astype(np.int64), documents, 2)
    with pytest.raises(TypeError):
        _csrc.sample_index_int32(lengths[::-1], documents, 2)
    with pytest.raises(IndexError):
        _csrc.sample_index_int32(lengths, documents + 1, 2)


def megatron_samples(megatron, megatron_config, corpus, documents, num_samples, seq_len, seed):
    low_level = megatron.indexed.IndexedDataset(corpus.prefix)
    split = next(iter(megatron.builder.Split))
    return megatron.gpt.GPTDataset(
        low_level, corpus.prefix, np.asarray(documents, dtype=np.int32), num_samples, split, megatron_config(seq_len, seed, split="1")
    )


def assert_equal_to_megatron(ours, theirs):
    assert np.array_equal(ours.document_index, theirs.document_index) and ours.document_index.dtype == theirs.document_index.dtype
    assert np.array_equal(ours.sample_index, theirs.sample_index) and ours.sample_index.dtype == theirs.sample_index.dtype
    assert np.array_equal(ours.shuffle_index, theirs.shuffle_index) and ours.shuffle_index.dtype == theirs.shuffle_index.dtype
    assert len(ours) == len(theirs)
    text = ours.gather(np.arange(len(ours)))
    for j in range(len(ours)):
        sample = theirs[j]
        assert np.array_equal(text[j, :-1], sample["tokens"].numpy())
        assert np.array_equal(text[j, 1:], sample["labels"].numpy())


def test_samples_equal_megatrons_over_epochs_and_splits(make_corpus, megatron, megatron_config):
    random = np.random.default_rng(1)
    kinds = set()
    for trial in range(60):
        corpus = make_corpus(random_lengths(random, 30), name=f"c{trial}", seed=trial)
        begin, end = sorted(random.choice(31, size=2, replace=False).tolist())
        documents = np.arange(begin, end)
        tokens = int(corpus.sequence_lengths[begin:end].sum())
        if tokens < 2:
            continue
        seq_len, seed = int(random.integers(1, max(2, tokens))), int(random.integers(2**31))
        wanted = int(random.uniform(0, 3.5) * tokens / seq_len)
        ours = GPTSamples(corpus, documents, wanted, seq_len, seed, "train")
        kinds.add((min(ours.plan.num_epochs, 3), ours.plan.num_samples_before_final is not None))
        assert_equal_to_megatron(ours, megatron_samples(megatron, megatron_config, corpus, documents, wanted, seq_len, seed))
        assert len(ours) >= wanted
    assert kinds == {(1, False), (2, False), (2, True), (3, False), (3, True)}


def test_one_pass_equals_megatrons(make_corpus, megatron, megatron_config):
    corpus = make_corpus([5, 0, 17, 9, 30])
    ours = GPTSamples(corpus, np.arange(5), None, 4, 3, "train")
    assert_equal_to_megatron(ours, megatron_samples(megatron, megatron_config, corpus, np.arange(5), None, 4, 3))


@pytest.mark.parametrize("num_samples", range(2, 40))
def test_number_of_epochs_is_the_least_that_suffices(num_samples):
    plan = plan_epochs(num_tokens=21, num_samples=num_samples, seq_len=5)
    assert plan.num_epochs * 21 >= num_samples * 5 + 1
    assert plan.num_epochs == 1 or (plan.num_epochs - 1) * 21 < num_samples * 5 + 1


def test_split_equals_megatrons(megatron):
    from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split

    random = np.random.default_rng(2)
    strings = ["969,30,1", "100", "1,1", "0,1,0", "99/1", ".5 .25 .25", "1.5,0,0.25"]
    strings += [",".join(str(x) for x in random.integers(0, 50, size=3) + [1, 0, 0]) for _ in range(50)]
    for split in strings:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        for (begin, end), theirs in zip(split_shares(split), matrix, strict=True):
            assert (None if end <= begin else (begin, end)) == theirs
        for count in (0, 1, 7, 1000, 12345679):
            ranges = split_documents(count, split)
            expected = [None if m is None else (int(round(m[0] * float(count))), int(round(m[1] * float(count)))) for m in matrix]
            assert [None if m is None else (r.start, r.stop) for r, m in zip(ranges, matrix)] == expected
            assert ranges[0].start == 0 and ranges[2].stop == count and all(a.stop == b.start for a, b in zip(ranges, ranges[1:]))


@pytest.mark.parametrize("split", ["", "train", "0,0,0", "1,2,3,4", "1.2.3"])
def test_split_refuses(split):
    with pytest.raises(DataError, match="969,30,1"):
        split_documents(10, split)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_tokens_segments_and_documents_agree(make_corpus, dtype):
    random = np.random.default_rng(3)
    corpus = make_corpus(random_lengths(random, 40), dtype=dtype, vocab_size=120)
    samples = GPTSamples(corpus, np.arange(40), 50, 13, 5, "train")
    order = random.permutation(len(samples))
    tokens, segments = samples.gather(order, segments=True)
    assert tokens.dtype == np.int64 and tokens.shape == (len(samples), 14)
    assert segments.dtype == np.int32 and segments.shape == (len(samples), 13)
    assert np.array_equal(tokens, samples.gather(order))
    for row, j in enumerate(order):
        parts = samples.documents_of(j)
        assert tokens[row].tolist() == [t for d, offset, n in parts for t in corpus.get(d, offset, n).tolist()]
        assert segments[row].tolist() == [i for i, (_, _, n) in enumerate(parts) for _ in range(n)][:13]
        assert all(n > 0 for _, _, n in parts)


def test_an_empty_first_document_is_no_segment(make_corpus):
    corpus = make_corpus([0, 0, 6])
    samples = GPTSamples(corpus, np.arange(3), None, 5, 1, "train")
    assert samples.document_index[0] != 2  # the seed puts an empty document first
    _, segments = samples.gather(np.array([0]), segments=True)
    assert segments.tolist() == [[0] * 5] and samples.documents_of(0) == [(2, 0, 6)]


def test_a_wide_sample_index_gathers_the_same(make_corpus):
    samples = GPTSamples(make_corpus([50] * 30), np.arange(30), None, 7, 1, "train")
    expected = samples.gather(np.arange(len(samples)), segments=True)
    samples.sample_index = samples.sample_index.astype(np.int64)
    for a, b in zip(samples.gather(np.arange(len(samples)), segments=True), expected):
        assert np.array_equal(a, b)


def test_threads_do_not_change_the_result(make_corpus):
    corpus = make_corpus([50] * 30)
    one, four = (GPTSamples(corpus, np.arange(30), None, 7, 1, "train", num_threads=n) for n in (1, 4))
    numbers = np.arange(len(one))
    for a, b in zip(one.gather(numbers, segments=True), four.gather(numbers, segments=True)):
        assert np.array_equal(a, b)
    assert four.gather(np.arange(0)).shape == (0, 8)


# --- the cache


def arrays(samples):
    return [samples.document_index, samples.sample_index, samples.shuffle_index]


def test_cache_is_used_and_equals_building(make_corpus, tmp_path, monkeypatch):
    corpus = make_corpus([9] * 20)
    build = lambda cache: GPTSamples(corpus, np.arange(20), 30, 7, 1, "train", cache_dir=cache)  # noqa: E731
    plain, first = build(None), build(tmp_path / "cache")
    names = sorted(os.listdir(tmp_path / "cache"))
    assert len(names) == 4 and all("-GPTSamples-train-" in name for name in names)
    monkeypatch.setattr(GPTSamples, "_build", lambda *_: pytest.fail("built although cached"))
    second = build(tmp_path / "cache")
    for a, b, c in zip(arrays(plain), arrays(first), arrays(second)):
        assert np.array_equal(a, b) and np.array_equal(a, c) and not (c.flags.owndata or c.flags.writeable)
    assert np.array_equal(plain.gather(np.arange(30)), second.gather(np.arange(30)))


def test_cache_tells_everything_apart_that_changes_the_order(make_corpus, tmp_path):
    corpus, other = make_corpus([9] * 20), make_corpus([9] * 19 + [8], name="other")
    base = dict(corpus=corpus, documents=np.arange(20), num_samples=10, seq_len=7, seed=1, split_name="train")
    # 49 samples are two epochs shuffled together, 30 are two of which the final one is separate.
    changes = [{}, {"corpus": other}, {"documents": np.arange(20)[::-1]}, {"num_samples": 49}, {"num_samples": 30}]
    changes += [{"seq_len": 8}, {"seed": 2}, {"split_name": "valid"}]
    for count, change in enumerate(changes, start=1):
        cached = GPTSamples(**base | change, cache_dir=tmp_path / "cache")
        assert len(os.listdir(tmp_path / "cache")) == 4 * count
        for a, b in zip(arrays(cached), arrays(GPTSamples(**base | change))):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("index", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "other shape"])
def test_damaged_cache_is_built_again(make_corpus, tmp_path, index, damage):
    corpus = make_corpus([9] * 20)
    build = lambda: GPTSamples(corpus, np.arange(20), 30, 7, 1, "train", cache_dir=tmp_path / "cache")  # noqa: E731
    expected = [np.array(a) for a in arrays(build())]
    path = next((tmp_path / "cache").glob(f"*-{index}.npy"))
    content = path.read_bytes()
    path.unlink()
    if damage == "other shape":
        np.save(path, np.zeros((3, 2), dtype=np.int32))
    else:
        path.write_bytes(content[: 0 if damage == "empty" else -4])
    for a, b in zip(arrays(build()), expected):
        assert np.array_equal(a, b)
    assert path.read_bytes() == content


def test_unwritable_cache_says_so(make_corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the index cache in .*choose a writable cache_dir"):
        GPTSamples(make_corpus([9] * 20), np.arange(20), 30, 7, 1, "train", cache_dir=tmp_path / "file" / "cache")


def _build_in_process(prefix, cache, queue):
    from engine.data.indexed import IndexedCorpus

    samples = GPTSamples(IndexedCorpus(prefix), np.arange(300), 4000, 7, 1, "train", cache_dir=cache)
    queue.put(int(samples.gather(np.arange(4000)).sum()))


def test_ranks_may_build_the_cache_at_once(make_corpus, tmp_path):
    corpus = make_corpus([40] * 300)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    queue = context.Queue()
    ranks = [context.Process(target=_build_in_process, args=(corpus.prefix, str(tmp_path / "cache"), queue)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    sums = {queue.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    expected = GPTSamples(corpus, np.arange(300), 4000, 7, 1, "train").gather(np.arange(4000)).sum()
    assert sums == {int(expected)}
    assert len(os.listdir(tmp_path / "cache")) == 4  # no temporary file is left


# --- refusals


def test_refuses_an_empty_split(make_corpus):
    with pytest.raises(DataError, match="the valid split has 0 of 20 documents, expected at least 1"):
        GPTSamples(make_corpus([9] * 20), np.arange(0), 5, 7, 1, "valid")


def test_refuses_documents_without_tokens(make_corpus):
    with pytest.raises(DataError, match="0 tokens in 2 documents"):
        GPTSamples(make_corpus([0, 0, 3]), np.arange(2), 5, 7, 1, "valid")


def test_refuses_foreign_documents(make_corpus):
    with pytest.raises(DataError, match="documents 0 to 20, but the corpus has 20"):
        GPTSamples(make_corpus([9] * 20), np.arange(21), 5, 7, 1, "train")


def test_refuses_more_than_one_epoch_when_told_to(make_corpus):
    corpus = make_corpus([9] * 20)  # 180 tokens: 25 samples of 7 + 1
    assert len(GPTSamples(corpus, np.arange(20), 25, 7, 1, "train", one_epoch=True)) == 25
    with pytest.raises(DataError, match=r"holds 25 samples of 7 tokens in one epoch, but 26 are asked for; .*one_epoch=False"):
        GPTSamples(corpus, np.arange(20), 26, 7, 1, "train", one_epoch=True)
    assert GPTSamples(corpus, np.arange(20), 26, 7, 1, "train").plan.num_epochs == 2


def test_refuses_less_than_one_sample(make_corpus):
    with pytest.raises(DataError, match="9 tokens, fewer than one sample of 10"):
        GPTSamples(make_corpus([9]), np.arange(1), None, 9, 1, "train")


@pytest.mark.parametrize("change, words", [({"seq_len": 0}, "seq_len is 0"), ({"num_samples": -1}, "num_samples is -1"), ({"seed": -1}, "seed is -1")])
def test_refuses_bad_numbers(make_corpus, change, words):
    with pytest.raises(DataError, match=words):
        GPTSamples(make_corpus([9] * 20), np.arange(20), **{"num_samples": 5, "seq_len": 7, "seed": 1, "split_name": "train"} | change)


@pytest.mark.parametrize("number", [-1, 25, 10**12])
def test_refuses_samples_beyond_the_end(make_corpus, number):
    samples = GPTSamples(make_corpus([9] * 20), np.arange(20), None, 7, 1, "train")
    with pytest.raises(DataError, match=rf"sample {number} is asked for, but there are 25 \(0 to 24\)"):
        samples.gather(np.array([3, number]))
    with pytest.raises(DataError, match=str(number)):
        samples.documents_of(number)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_gather_refuses_an_index_of_another_corpus(make_corpus, num_threads):
    """A cache put in place by hand must end in an error, not in foreign memory."""
    corpus = make_corpus([9] * 20)
    samples = GPTSamples(corpus, np.arange(20), None, 7, 1, "train", num_threads=num_threads)
    good = samples.sample_index
    bad_offset, bad_document, shorter = good.copy(), good.copy(), good.copy()
    bad_offset[1:, 1] += 9
    bad_document[1:, 0] += 20
    shorter[1:, 1] = 0
    for bad in (bad_offset, bad_document, shorter):
        samples.sample_index = bad
        with pytest.raises(DataError, match="delete the index cache"):
            samples.gather(np.arange(25))
    samples.sample_index = good
    samples.document_index = samples.document_index + np.int32(20)
    with pytest.raises(DataError, match="delete the index cache"):
        samples.gather(np.arange(25))


BROKEN_INDICES = {
    "past the end of a document": ([0, 1], [[0, 6], [0, 10]], 0, "tokens 6 to 11 of document 0, length 9"),
    "before its start": ([0, 1], [[0, -1], [0, 3]], 0, "tokens -1 to 4 of document 0"),
    "more tokens than a row": ([0, 1], [[0, 0], [0, 5]], 0, "tokens 0 to 6 of document 0"),
    "fewer tokens than a row": ([0, 1], [[0, 0], [0, 3]], 0, "sample 0 holds 4 tokens, expected 5"),
    "document beyond the corpus": ([2, 1], [[0, 0], [0, 4]], 0, "document 2 of 2"),
    "negative document": ([-1, 1], [[0, 0], [0, 4]], 0, "document -1 of 2"),
    "position beyond the documents": ([0, 1], [[1, 8], [2, 3]], 0, "documents 1 to 2 of 2"),
    "negative position": ([0, 1], [[-1, 8], [0, 3]], 0, "documents -1 to 0 of 2"),
    "positions backwards": ([0, 1], [[1, 0], [0, 4]], 0, "documents 1 to 0 of 2"),
    "row beyond the index": ([0, 1], [[0, 0], [0, 4]], 1, "sample 1 of 1"),
    "negative row": ([0, 1], [[0, 0], [0, 4]], -1, "sample -1 of 1"),
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", BROKEN_INDICES)
def test_gather_refuses_each_broken_index(make_corpus, name, dtype):
    documents, starts, row, words = BROKEN_INDICES[name]
    corpus = make_corpus([9, 9])
    with pytest.raises(DataError, match=words):
        _csrc.gather(corpus.mapped, np.array(documents, dtype=np.int32), np.array(starts, dtype=dtype), np.array([row]), 4)
