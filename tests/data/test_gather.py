"""Gathering into the caller's memory: the same rows as without, nothing beside them touched, and every refusal; threads that stay."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from engine import _csrc
from engine.data.indexed import DataError
from engine.data.pretraining import GPTSamples

SEQ_LEN = 12


@pytest.fixture
def samples(make_corpus):
    return GPTSamples(make_corpus(np.random.default_rng(5).integers(0, 40, size=60)), np.arange(60), 100, SEQ_LEN, 1, "train")


def gather(samples, rows, **options):
    return _csrc.gather(samples.corpus.mapped, samples.document_index, samples.sample_index, np.asarray(rows, dtype=np.int64), SEQ_LEN, **options)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_go_straight_into_a_buffer_and_nowhere_else(samples, num_threads):
    rows = np.arange(7, 27)
    tokens, segments = gather(samples, rows, segments=True)
    big, ids = np.full((30, SEQ_LEN + 1), -5), np.full((30, SEQ_LEN), -5, dtype=np.int32)
    answer = gather(samples, rows, num_threads=num_threads, tokens_out=big[4:24], segments_out=ids[4:24])
    assert answer[0].base is big and answer[1].base is ids  # the memory given, not a copy
    assert np.array_equal(big[4:24], tokens) and np.array_equal(ids[4:24], segments)
    assert (np.delete(big, np.s_[4:24], 0) == -5).all() and (np.delete(ids, np.s_[4:24], 0) == -5).all()
    assert gather(samples, rows, tokens_out=big[4:24])[1] is None


def test_places_scatter_the_rows(samples):
    rows, places = np.arange(20), np.random.default_rng(0).permutation(33)[:20]
    tokens, segments = gather(samples, rows, segments=True)
    big, ids = np.full((33, SEQ_LEN + 1), -5), np.full((33, SEQ_LEN), -5, dtype=np.int32)
    gather(samples, rows, num_threads=4, tokens_out=big, segments_out=ids, places=places)
    assert np.array_equal(big[places], tokens) and np.array_equal(ids[places], segments)
    assert (np.delete(big, places, 0) == -5).all() and (np.delete(ids, places, 0) == -5).all()


def buffer(rows=3, width=SEQ_LEN + 1, dtype=np.int64):
    return np.zeros((rows, width), dtype=dtype)


def read_only():
    array = buffer()
    array.setflags(write=False)
    return array


REFUSED = {
    "dtype": (dict(tokens_out=buffer(dtype=np.int32)), r"tokens_out is int32, expected a writable C-contiguous array int64 \[3, 13\]"),
    "list": (dict(tokens_out=[[0] * 13] * 3), "tokens_out is <class 'list'>"),
    "rows": (dict(tokens_out=buffer(4)), r"tokens_out is of shape \(4, 13\)"),
    "width": (dict(tokens_out=buffer(3, 12)), r"tokens_out is of shape \(3, 12\)"),
    "flat": (dict(tokens_out=np.zeros(39, dtype=np.int64)), r"tokens_out is of shape \(39,\)"),
    "strided": (dict(tokens_out=buffer(3, 26)[:, ::2]), "tokens_out is not C-contiguous"),
    "read-only": (dict(tokens_out=read_only()), "tokens_out is read-only"),
    "unaligned": (dict(tokens_out=np.zeros(3 * 13 * 8 + 1, dtype=np.uint8)[1:].view(np.int64).reshape(3, 13)), "tokens_out is not aligned"),
    "segments dtype": (dict(segments_out=buffer(3, 12)), r"segments_out is int64, expected .* int32 \[3, 12\]"),
    "segments shape": (dict(segments_out=buffer(3, 13, np.int32)), r"segments_out is of shape \(3, 13\)"),
    "places without a buffer": (dict(places=np.arange(3)), "places needs tokens_out"),
    "places of another number": (dict(tokens_out=buffer(), places=np.arange(2)), "places must be one-dimensional, one for each of 3 rows"),
    "too few rows for places": (dict(tokens_out=buffer(2), places=np.arange(3)), r"expected .* int64 \[at least 3, 13\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_buffer_that_does_not_fit_is_a_type_error(samples, name):
    options, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        gather(samples, [0, 1, 2], **options)


@pytest.mark.parametrize("places, error", [([0, 1, 3], IndexError), ([0, -1, 2], IndexError), ([0, 1, 1], ValueError)])
def test_places_outside_or_twice_are_refused(samples, places, error):
    with pytest.raises(error, match=r"place (3|-1) of 3 rows|place 1 is given twice"):
        gather(samples, [0, 1, 2], tokens_out=buffer(), places=np.array(places))


def test_the_same_error_for_any_number_of_threads(samples):
    rows = np.arange(64)
    rows[[9, 40]] = [1000, 2000]
    for num_threads in (1, 2, 64):
        with pytest.raises(DataError, match="sample 1000 of"):
            gather(samples, rows, num_threads=num_threads)


def num_data_threads():
    return sum(comm.read_text() == "trireme-data\n" for comm in Path("/proc/self/task").glob("*/comm"))


def test_threads_are_kept_shared_between_callers_and_started_anew_in_a_child(samples):
    rows = np.arange(100)
    expected = gather(samples, rows)[0]
    gather(samples, rows, num_threads=5)
    before = num_data_threads()
    answers = [None] * 4

    def work(k):
        answers[k] = [gather(samples, rows, num_threads=5)[0] for _ in range(50)]

    callers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [thread.start() for thread in callers]
    [thread.join() for thread in callers]
    assert num_data_threads() == before >= 4
    assert all(np.array_equal(answer, expected) for several in answers for answer in several)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(gather(samples, rows, num_threads=5)[0], expected) and num_data_threads() == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
