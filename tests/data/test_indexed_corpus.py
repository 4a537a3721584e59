"""Reading and writing .idx/.bin: byte equality with megatron-core both ways, and every refusal."""

import os
import struct

import numpy as np
import pytest

from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter, optimal_dtype

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[]], [[7, 8, 9, 10]]]  # document -> its sequences


def write(prefix, dtype=np.int32, documents=DOCUMENTS):
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([t for s in sequences for t in s], [len(s) for s in sequences])
    return str(prefix)


def megatron_write(megatron, prefix, dtype=np.int32, documents=DOCUMENTS):
    import torch

    builder = megatron.indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor([t for s in sequences for t in s]), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_files_equal_megatrons_byte_for_byte(tmp_path, megatron, dtype):
    ours, theirs = write(tmp_path / "ours", dtype), megatron_write(megatron, tmp_path / "theirs", dtype)
    for kind in ("bin", "idx"):
        assert open(f"{ours}.{kind}", "rb").read() == open(f"{theirs}.{kind}", "rb").read()


def test_megatron_opens_ours_and_we_open_megatrons(tmp_path, megatron):
    ours = megatron.indexed.IndexedDataset(write(tmp_path / "ours"))
    theirs = IndexedCorpus(megatron_write(megatron, tmp_path / "theirs"))
    expected = [s for sequences in DOCUMENTS for s in sequences]
    assert len(ours) == len(theirs) == len(expected)
    for i, sequence in enumerate(expected):
        assert ours[i].tolist() == theirs.get(i).tolist() == sequence
    assert ours.document_indices.tolist() == theirs.document_indices.tolist() == [0, 1, 3, 4, 5]
    assert theirs.sequence_lengths.tolist() == [3, 1, 2, 0, 4]
    assert theirs.dtype == np.int32 and theirs.num_tokens == 10


def test_get_slices_like_megatron(tmp_path, megatron):
    prefix = write(tmp_path / "c")
    ours, theirs = IndexedCorpus(prefix), megatron.indexed.IndexedDataset(prefix)
    for i, offset, length in [(0, 0, None), (0, 1, None), (4, 1, 2), (4, 4, None), (2, 0, 1)]:
        assert ours.get(i, offset, length).tolist() == theirs.get(i, offset, length).tolist()


@pytest.mark.parametrize("arguments", [(5,), (-1,), (0, 4), (0, -1), (0, 0, 4), (0, 2, -1), (0, 2**62, 2**62)])
def test_get_outside_the_corpus_is_an_index_error(tmp_path, arguments):
    corpus = IndexedCorpus(write(tmp_path / "c"))
    with pytest.raises(IndexError):
        corpus.get(*arguments)


def test_views_outlive_the_corpus_and_are_read_only(tmp_path):
    corpus = IndexedCorpus(write(tmp_path / "c"))
    tokens, lengths = corpus.get(4), corpus.sequence_lengths
    assert not tokens.flags.owndata and not lengths.flags.owndata  # mapped, not copied
    del corpus
    assert tokens.tolist() == [7, 8, 9, 10] and lengths.tolist() == [3, 1, 2, 0, 4]
    with pytest.raises(ValueError):
        tokens[0] = 1
    with pytest.raises(ValueError):
        lengths[0] = 1


def test_max_token(tmp_path):
    assert IndexedCorpus(write(tmp_path / "a")).max_token() == 10
    assert IndexedCorpus(write(tmp_path / "b", np.int64, [[[3, 2**40, 5]]])).max_token() == 2**40
    assert IndexedCorpus(write(tmp_path / "c", np.uint16, [[[65535]]])).max_token() == 65535


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 200000])
def test_optimal_dtype_is_megatrons(megatron, vocab_size):
    assert optimal_dtype(vocab_size) == np.dtype(megatron.indexed.DType.optimal_dtype(vocab_size))


def test_add_corpus_is_megatrons_merge(tmp_path, megatron):
    first, second = write(tmp_path / "first"), write(tmp_path / "second", documents=[[[11]], [[12, 13], []]])
    with IndexedWriter(tmp_path / "ours", np.int32) as writer:
        writer.add_corpus(IndexedCorpus(first))
        writer.add_corpus(IndexedCorpus(second))
    builder = megatron.indexed.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.int32)
    builder.add_index(first)
    builder.add_index(second)
    builder.finalize(f"{tmp_path}/theirs.idx")
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


# --- the writer's refusals and its promise that only whole files appear


def test_nothing_appears_before_finalize_or_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError):
        with IndexedWriter(tmp_path / "c", np.int32) as writer:
            writer.add_document([1, 2])
            assert not {"c.bin", "c.idx"} & set(os.listdir(tmp_path))
            raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_failed_rewrite_leaves_the_old_corpus(tmp_path):
    write(tmp_path / "c")
    with pytest.raises(DataError):
        with IndexedWriter(tmp_path / "c", np.uint8) as writer:
            writer.add_document([300])
    assert IndexedCorpus(tmp_path / "c").get(0).tolist() == [1, 2, 3]
    write(tmp_path / "c", documents=[[[42]]])
    assert IndexedCorpus(tmp_path / "c").get(0).tolist() == [42]
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.idx"]


@pytest.mark.parametrize(
    "dtype, tokens, words",
    [
        (np.uint16, [65536], ["65536", "uint16", "65535", "optimal_dtype"]),
        (np.uint16, [-1], ["-1", "uint16"]),
        (np.int8, np.array([200], dtype=np.int32), ["200", "int8"]),
        (np.int32, [1.5], ["integers"]),
        (np.int32, [[1, 2]], ["flat list"]),
    ],
)
def test_writer_refuses_ids(tmp_path, dtype, tokens, words):
    writer = IndexedWriter(tmp_path / "c", dtype)
    with pytest.raises(DataError) as error:
        writer.add_document(tokens)
    assert all(word in str(error.value) for word in words)
    writer.abort()


def test_writer_refuses_float_dtype_empty_corpus_lengths_and_unwritable_folder(tmp_path):
    with pytest.raises(DataError, match="float32"):
        IndexedWriter(tmp_path / "c", np.float32)
    with pytest.raises(DataError, match="no documents"):
        IndexedWriter(tmp_path / "c", np.int32).finalize()
    with pytest.raises(DataError, match="lengths sum to 3"):
        with IndexedWriter(tmp_path / "c", np.int32) as writer:
            writer.add_document([1, 2], [1, 2])
    with pytest.raises(DataError, match="names a folder"):
        IndexedWriter(f"{tmp_path}/", np.int32)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="writable folder"):
        IndexedWriter(tmp_path / "file" / "c", np.int32)
    assert os.listdir(tmp_path) == ["file"]


def test_writer_refuses_to_mix_dtypes(tmp_path):
    corpus = IndexedCorpus(write(tmp_path / "a", np.int32))
    with pytest.raises(DataError, match="int32, expected uint16"):
        with IndexedWriter(tmp_path / "b", np.uint16) as writer:
            writer.add_corpus(corpus)


# --- the reader's refusals. DOCUMENTS gives S = 5, D = 5: lengths at 34, offsets at 54, documents at 94, end at 134.


def patch(at, layout, value):
    def apply(data):
        struct.pack_into(layout, data, at, value)
        return data

    return apply


DAMAGE = {
    "magic": (patch(0, "<B", 0x58), ["magic is 58 4D 49", "expected 4D 4D 49 44 49 44 58 00 00"]),
    "version": (patch(9, "<Q", 2), ["version is 2, expected 1"]),
    "dtype unknown": (patch(17, "<B", 9), ["dtype code is 9"]),
    "dtype float": (patch(17, "<B", 7), ["dtype code is 7", "integers"]),
    "dtype of another size": (patch(17, "<B", 5), ["byte offset of sequence 1 is 12, expected 24"]),
    "sequence count beyond the file": (patch(18, "<Q", 2**63), ["sequence count is 9223372036854775808, expected at most"]),
    "sequence count off by one": (patch(18, "<Q", 4), ["file size is 134, expected 122"]),
    "no sequences": (patch(18, "<Q", 0), ["sequence count is 0, expected at least 1"]),
    "document count beyond the file": (patch(26, "<Q", 2**62), ["document count is 4611686018427387904"]),
    "document count": (patch(26, "<Q", 1), ["document count is 1, expected at least 2"]),
    "negative length": (patch(34, "<i", -3), ["length of sequence 0 is -3, expected 0 or more"]),
    "length": (patch(34, "<i", 4), ["byte offset of sequence 1 is 12, expected 16"]),
    "last length": (patch(50, "<i", 5), ["c.bin: file size is 40, expected 44"]),
    "first offset": (patch(54, "<q", 4), ["byte offset of sequence 0 is 4, expected 0"]),
    "first document": (patch(94, "<q", 1), ["first document entry is 1, expected 0"]),
    "documents not in order": (patch(102, "<q", 4), ["document entry 2 is 3, expected at least 4"]),
    "last document": (patch(126, "<q", 4), ["last document entry is 4, expected 5"]),
    "truncated": (lambda data: data[:100], ["file size is 100, expected 134"]),
    "truncated header": (lambda data: data[:20], ["file size is 20, expected at least 34"]),
    "empty": (lambda data: data[:0], ["file size is 0, expected at least 34"]),
    "longer": (lambda data: data + b"x", ["file size is 135, expected 134"]),
    "multimodal": (lambda data: data + bytes(5), ["multimodal"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_reader_refuses_damage(tmp_path, name):
    apply, words = DAMAGE[name]
    path = write(tmp_path / "c") + ".idx"
    data = apply(bytearray(open(path, "rb").read()))
    open(path, "wb").write(bytes(data))
    with pytest.raises(DataError) as error:
        IndexedCorpus(tmp_path / "c")
    for word in [str(tmp_path / "c")] + words:
        assert word in str(error.value)


def test_reader_refuses_truncated_and_longer_bin(tmp_path):
    path = write(tmp_path / "c") + ".bin"
    data = open(path, "rb").read()
    for wrong in (data[:-1], data[:-4], data + bytes(4), b""):
        open(path, "wb").write(wrong)
        with pytest.raises(DataError, match=rf"c\.bin: file size is {len(wrong)}, expected 40 .*copy or write both again"):
            IndexedCorpus(tmp_path / "c")


def test_reader_refuses_missing_files_with_the_cure(tmp_path):
    prefix = write(tmp_path / "c")
    assert issubclass(DataError, ValueError)
    with pytest.raises(DataError, match=r"nothing\.idx: cannot open the file: No such file.*check the prefix"):
        IndexedCorpus(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"give the prefix without \.idx: {prefix}$"):
        IndexedCorpus(prefix + ".idx")
    os.unlink(prefix + ".bin")
    with pytest.raises(DataError, match=r"c\.bin: cannot open"):
        IndexedCorpus(prefix)
    os.mkdir(prefix + ".bin")
    with pytest.raises(DataError, match="not a regular file"):
        IndexedCorpus(prefix)
