"""Corpora that are opened without being read: many, huge, or damaged in the middle; and reading on demand beside mapping."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import _csrc
from engine.data.blend import build_pretraining
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter
from engine.data.pretraining import GPTSamples
from engine.data.storage import open_corpus

STORAGES = ("mmap", "pread")
NUM_SEQUENCES = 2000  # blocks are 512


def write(prefix, lengths, dtype=np.uint16, seed=0):
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document(random.integers(0, 1000, size=int(length)))
    return str(prefix)


def put(path, at, layout, value):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array([value], dtype=layout).tobytes())


# --- on demand


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_pread_reads_what_mmap_reads(tmp_path, dtype, num_threads):
    lengths = np.random.default_rng(1).integers(0, 60, size=300)
    mapped, read = (open_corpus(write(tmp_path / "c", lengths, dtype), storage) for storage in STORAGES)
    assert all(np.array_equal(mapped.get(i), read.get(i)) for i in range(300))
    assert read.get(5, 1, 2).tolist() == mapped.get(5, 1, 2).tolist() and not read.get(0).flags.writeable
    assert mapped.max_token() == read.max_token()
    a, b = (GPTSamples(corpus, np.arange(300), 900, 24, 1, "train", num_threads=num_threads) for corpus in (mapped, read))
    numbers = np.random.default_rng(2).permutation(900)
    b.announce(numbers)
    for x, y in zip(a.gather(numbers, segments=True), b.gather(numbers, segments=True)):
        assert np.array_equal(x, y)
    assert b.gather(numbers[:0]).shape == (0, 25)


def test_a_blend_over_pread_is_the_same(tmp_path):
    blend = [x for k in range(4) for x in (str(k + 1), write(tmp_path / f"c{k}", [30] * 40, seed=k))]
    a, b = (build_pretraining(blend, "1", 16, (200, 0, 0), 1, None, storage=storage)[0] for storage in STORAGES)
    assert np.array_equal(a.gather(np.arange(200)), b.gather(np.arange(200)))


def test_pread_tells_of_a_file_that_was_cut_or_replaced(tmp_path):
    prefix = write(tmp_path / "c", [50] * 100)
    samples = GPTSamples(open_corpus(prefix, "pread"), np.arange(100), None, 24, 1, "train")
    everything = np.arange(len(samples))
    expected = samples.gather(everything)
    os.truncate(prefix + ".bin", 9000)
    with pytest.raises(DataError, match=r"c\.bin: the file ends at byte 9000, expected 10000 bytes"):
        samples.gather(everything)
    write(tmp_path / "c", [50] * 100)
    with open(prefix + ".bin", "rb") as other, open(tmp_path / "new.bin", "wb") as file:
        file.write(other.read())
    assert np.array_equal(GPTSamples(open_corpus(prefix, "pread"), np.arange(100), None, 24, 1, "train").gather(everything), expected)
    fresh = GPTSamples(open_corpus(prefix, "pread"), np.arange(100), None, 24, 1, "train")
    os.replace(tmp_path / "new.bin", prefix + ".bin")  # the descriptor of the old file is still open: its tokens are still right
    assert np.array_equal(fresh.gather(everything), expected)
    for k in range(256):  # as many as stay open: the descriptor goes
        os.link(prefix + ".idx", f"{tmp_path}/{k}.idx")
        os.link(prefix + ".bin", f"{tmp_path}/{k}.bin")
    others = [IndexedCorpus(f"{tmp_path}/{k}", "pread") for k in range(256)]
    with pytest.raises(DataError, match=r"c\.bin: the file was replaced or resized while it was in use"):
        fresh.gather(everything)
    assert others[0].num_tokens == 5000


def test_storage_has_two_names(tmp_path):
    with pytest.raises(ValueError, match="storage is disk, expected mmap or pread"):
        open_corpus(write(tmp_path / "c", [3]), "disk")


def test_a_file_url_is_a_local_path(tmp_path):
    assert open_corpus("file://" + write(tmp_path / "c", [3, 4])).num_tokens == 7


# --- damage far from both ends: opening does not see it, using it does, and nothing else suffers


def damaged(tmp_path, name):
    """A corpus with one wrong field in the middle, and the words of its error; arrays begin at 34, 34 + 4 S and 34 + 12 S."""
    prefix = write(tmp_path / "c", np.random.default_rng(4).integers(1, 9, size=NUM_SEQUENCES))
    at, layout, value, words = {
        "length": (34 + 4 * 1000, "<i4", 77, "byte offset of sequence 1001 is"),
        "negative length": (34 + 4 * 1000, "<i4", -2, "length of sequence 1000 is -2, expected 0 or more"),
        "offset": (34 + 4 * NUM_SEQUENCES + 8 * 1000, "<i8", 4, r"byte offset of sequence 1000 is 4, expected \d+ \(where sequence 999 ends\)"),
        "huge offset": (34 + 4 * NUM_SEQUENCES + 8 * 1000, "<i8", 2**63 - 8, "byte offset of sequence 1000 is 9223372036854775800"),
    }[name]
    put(prefix + ".idx", at, layout, value)
    return prefix, words


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["length", "negative length", "offset", "huge offset"])
def test_damage_in_the_middle_is_an_error_where_it_is_used(tmp_path, name, storage):
    prefix, words = damaged(tmp_path, name)
    sound = IndexedCorpus(write(tmp_path / "sound", np.random.default_rng(4).integers(1, 9, size=NUM_SEQUENCES)))
    corpus = IndexedCorpus(prefix, storage)
    for i in (0, 511, 512 * 3, NUM_SEQUENCES - 1):
        assert np.array_equal(corpus.get(i), sound.get(i))
    for use in (lambda: corpus.get(1000), lambda: corpus.get(600), lambda: corpus.sequence_lengths, corpus.verify,
                lambda: GPTSamples(corpus, np.arange(10), None, 8, 1, "train")):
        with pytest.raises(DataError, match=rf"c\.idx: {words}"):
            use()
    # A sample index that a cache kept: gathering looks too.
    starts = np.array([[0, 0], [4, 0]], dtype=np.int32)
    with pytest.raises(DataError, match=words):
        _csrc.gather(corpus.mapped, np.arange(998, 1003, dtype=np.int32), starts, np.array([0]), 1)


def test_a_displaced_run_of_whole_blocks_is_found_by_what_training_reads(tmp_path):
    prefix = write(tmp_path / "c", np.random.default_rng(4).integers(1, 9, size=3000))
    index = bytearray(Path(prefix + ".idx").read_bytes())
    offsets = np.frombuffer(index, dtype="<i8", count=3000, offset=34 + 4 * 3000)
    offsets[600:2200] += 2
    Path(prefix + ".idx").write_bytes(index)
    corpus = IndexedCorpus(prefix)
    with pytest.raises(DataError, match=r"byte offset of sequence 600 is"):
        corpus.sequence_lengths
    for i in (600, 900, 2100, 2300):  # the blocks at both ends of the run do not fit their neighbours
        with pytest.raises(DataError, match="byte offset of sequence"):
            corpus.get(i)


@pytest.mark.parametrize("value, words", [(0, r"document entry 1000 is 0, expected at least 999"), (5000, "document entry 1000 is 5000, expected at most 2000")])
def test_damaged_documents_are_an_error_where_they_are_used(tmp_path, value, words):
    prefix = write(tmp_path / "c", [2] * NUM_SEQUENCES)
    put(prefix + ".idx", 34 + 12 * NUM_SEQUENCES + 8 * 1000, "<i8", value)
    corpus = IndexedCorpus(prefix)
    assert corpus.document(3) == (3, 4) and corpus.num_documents == NUM_SEQUENCES and corpus.get(1000).size == 2
    for use in (lambda: corpus.document(1000), lambda: corpus.document_indices, corpus.verify):
        with pytest.raises(DataError, match=words):
            use()
    with pytest.raises(IndexError):
        corpus.document(NUM_SEQUENCES)


def test_a_signed_code_for_unsigned_ids_is_an_error(tmp_path):
    with IndexedWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([40000] * 9)
    put(f"{tmp_path}/c.idx", 17, "<u1", 3)
    for storage in STORAGES:
        corpus = IndexedCorpus(tmp_path / "c", storage)
        assert corpus.get(0).tolist() == [1, 2, 3]
        for use in (lambda: corpus.get(1), lambda: GPTSamples(corpus, np.arange(2), None, 4, 1, "train").gather(np.arange(2))):
            with pytest.raises(DataError, match=r"c\.idx: dtype code is 3, expected .* negative numbers"):
                use()


# --- many and huge


def test_ten_thousand_corpora_open_and_read_with_few_descriptors(tmp_path):
    write(tmp_path / "c", [3, 5])
    prefixes = [f"{tmp_path}/{k}" for k in range(10_000)]
    for prefix in prefixes:
        os.link(tmp_path / "c.idx", prefix + ".idx")
        os.link(tmp_path / "c.bin", prefix + ".bin")
    expected = IndexedCorpus(tmp_path / "c").get(1).tolist()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        for storage in STORAGES:
            corpora = [IndexedCorpus(prefix, storage) for prefix in prefixes]
            assert all(corpus.get(1).tolist() == expected for corpus in corpora)
            with open(prefixes[0] + ".idx", "rb") as file:  # there is room left for others
                assert file.fileno() < 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_samples_of_many_corpora_hold_no_descriptors(tmp_path):
    items = [item for k in range(12) for item in ("1", write(tmp_path / str(k), [30, 50], seed=k))]
    num_open = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    before, built = num_open(), []
    for _ in ("made", "found in the cache"):
        built.append(build_pretraining(items, "1", 8, (100, 0, 0), 1, tmp_path / "cache")[0])
        assert num_open() == before
    plain = build_pretraining(items, "1", 8, (100, 0, 0), 1)[0]
    assert all(np.array_equal(samples.gather(np.arange(100)), plain.gather(np.arange(100))) for samples in built)
    index = built[1].datasets[0].sample_index
    assert not index.flags.owndata and not index.flags.writeable  # the file's pages, which ranks share


HUGE = """
import re, sys, time
from engine.data.indexed import IndexedCorpus
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
start = time.perf_counter()
corpus = IndexedCorpus(sys.argv[1], sys.argv[2])
assert len(corpus) == corpus.num_documents == 10**9
assert corpus.get(10**9 - 1).tolist() == [11, 12, 13] and corpus.get(500_000_000).size == 0
assert corpus.document(10**9 - 1) == (0, 10**9)
seconds = time.perf_counter() - start
print(seconds, peak() - before)
"""


@pytest.mark.parametrize("storage", STORAGES)
def test_a_corpus_of_1e9_documents_opens_at_once(tmp_path, storage):
    """Sparse: all sequences are empty and all entries 0 but the last, so that 20 GB of index are a few blocks on disk."""
    number = 10**9
    with open(tmp_path / "c.idx", "wb") as index:
        index.write(b"MMIDIDX\0\0" + np.array([1], dtype="<u8").tobytes() + b"\x08" + np.array([number, number + 1], dtype="<u8").tobytes())
        size = 34 + 12 * number + 8 * (number + 1)
        index.truncate(size)
    put(tmp_path / "c.idx", 34 + 4 * (number - 1), "<i4", 3)
    put(tmp_path / "c.idx", size - 8, "<i8", number)
    np.array([11, 12, 13], dtype="<u2").tofile(tmp_path / "c.bin")
    assert os.stat(tmp_path / "c.idx").st_blocks * 512 < 2**20
    done = subprocess.run([sys.executable, "-c", HUGE, str(tmp_path / "c"), storage], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert kilobytes < 20_000 and seconds < 5  # reading 20 GB takes far longer, on any machine
