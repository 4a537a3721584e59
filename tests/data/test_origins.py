"""Origins of sequences and tokens: packing gives back what was packed, look-ups name the right file and line, damage is told."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.origins import Origins, OriginsWriter, pack_starts, unpack_steps
from engine.data.indexed import DataError, IndexedWriter

starts_of_a_sequence = st.lists(st.integers(0, 2**31 - 1) | st.integers(250, 260) | st.just(0xFF), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(starts_of_a_sequence, max_size=6))
def test_packing_gives_back_every_start(sequences):
    flat = np.array([start for sequence in sequences for start in sequence], dtype=np.int64)
    packed, sizes = pack_starts(flat, [len(sequence) for sequence in sequences])
    pointers = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    assert pointers[-1] == len(packed)
    for sequence, begin, end in zip(sequences, pointers, pointers[1:]):
        assert np.cumsum(unpack_steps(packed[begin:end])).tolist() == sequence


def write(prefix, with_tokens=True):
    writer = OriginsWriter(prefix, with_tokens)
    for path, lines, starts in [("a", [1, 4], [[0, 3], [0, 300, 300]]), ("b", [2**32 - 1], [[7]]), ("c", [], []), ("a", [9], [[0]])]:
        writer.add(path, lines, *pack_starts([s for row in starts for s in row], [len(row) for row in starts]))
    return writer


@pytest.mark.parametrize("with_tokens", [True, False])
def test_documents_and_tokens_are_found(tmp_path, with_tokens):
    writer = write(tmp_path / "c", with_tokens)
    assert Origins.open(tmp_path / "c") is None
    writer.finalize()
    origins = Origins.open(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c.origins"]
    assert [origins.document(i) for i in range(len(origins))] == [("a", 1), ("a", 4), ("b", 2**32 - 1), ("a", 9)]
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            origins.document(outside)
    if not with_tokens:
        with pytest.raises(DataError, match="--keep-offsets"):
            origins.token(0, 0)
        return
    assert [origins.token(1, i) for i in range(3)] == [("a", 4, 0), ("a", 4, 300), ("a", 4, 300)]
    assert origins.token(2, 0) == ("b", 2**32 - 1, 7)
    with pytest.raises(IndexError, match="token 3 of sequence 1, which has 3"):
        origins.token(1, 3)


def test_sequences_are_copied_from_other_origins(tmp_path):
    write(tmp_path / "c").finalize()
    source, writer = Origins.open(tmp_path / "c"), OriginsWriter(tmp_path / "d", with_tokens=True)
    writer.add_from(source, [3, 1])
    writer.finalize()
    copy = Origins.open(tmp_path / "d")
    assert [copy.document(i) for i in range(2)] == [("a", 9), ("a", 4)] and copy.starts(1).tolist() == [0, 300, 300]


def test_damage_and_another_corpus_are_told(tmp_path):
    write(tmp_path / "c").finalize()
    whole = (tmp_path / "c.origins").read_bytes()
    for cut in (0, 7, 15, 40, len(whole) - 1):
        (tmp_path / "c.origins").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="c.origins: not a file of origins"):
            Origins.open(tmp_path / "c")
    (tmp_path / "c.origins").write_bytes(whole)
    with IndexedWriter(tmp_path / "c", np.uint16) as corpus:
        corpus.add_document([1, 2])
    with pytest.raises(DataError, match="tells of 4 sequences and .*c.idx holds 1"):
        Origins.open(tmp_path / "c")
    with pytest.raises(DataError, match="counts to 4294967295"):
        OriginsWriter(tmp_path / "e").add("f", [2**32])
