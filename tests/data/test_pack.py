"""Rows of conversations: how full they are, that nothing is lost, in what order they come, and that packed equals unpacked."""

import itertools

import numpy as np
import pytest
import ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _csrc
from engine.data.conversations import Conversations, Report
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter
from engine.data.pack import Order, PackedRows, Rows

SEQ, VOCAB = 32, 251


def packed(lengths, capacity) -> list[list[int]]:
    documents, starts = _csrc.pack_best_fit(np.array(lengths, dtype=np.int32), capacity)
    return [documents[begin:end].tolist() for begin, end in zip(starts, starts[1:])]


def first_fit_decreasing(lengths, capacity) -> int:
    room = []
    for length in sorted(lengths, reverse=True):
        k = next((k for k, left in enumerate(room) if left >= length), None)
        if k is None:
            room.append(capacity - length)
        else:
            room[k] -= length
    return len(room)


def best_fit_decreasing(lengths, capacity) -> list[list[int]]:
    """The definition, in quadratic time."""
    rows, room = [], []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [k for k, left in enumerate(room) if left >= lengths[document]]
        if not fitting:
            rows.append([])
            room.append(capacity)
            fitting = [len(rows) - 1]
        k = min(fitting, key=lambda k: room[k])
        rows[k].append(document)
        room[k] -= lengths[document]
    return rows


def fewest(lengths, capacity) -> int:
    """The optimum, by trying every assignment."""
    for num in itertools.count(1):
        for rows in itertools.product(range(num), repeat=len(lengths)):
            if max(np.bincount(rows, weights=lengths)) <= capacity:
                return num


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120), capacity=st.integers(50, 200))
def test_best_fit_decreasing(lengths, capacity):
    rows = packed(lengths, capacity)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    fill = lambda rows: sorted(sum(lengths[i] for i in row) for row in rows)  # noqa: E731
    assert fill(rows) == fill(best_fit_decreasing(lengths, capacity))
    assert packed(lengths, capacity) == rows


def test_never_worse_than_first_fit_decreasing_on_random_lengths():
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(random.integers(20, 3000))
        lengths = np.minimum(random.lognormal(np.log(capacity / 6), 1.0, 300).astype(int) + 1, capacity).tolist()
        assert len(packed(lengths, capacity)) <= first_fit_decreasing(lengths, capacity)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_near_the_optimum(lengths):
    """Small enough to try every assignment."""
    assert fewest(lengths, 12) <= len(packed(lengths, 12)) <= fewest(lengths, 12) + 1


def test_equal_lengths_go_in_the_order_given():
    assert packed([5, 5, 5, 5], 10) == [[0, 1], [2, 3]] and packed([], 10) == []


def test_a_realistic_mix_fills_its_rows():
    lengths = np.clip(np.random.default_rng(1).lognormal(6.0, 1.0, 20_000), 8, 4096).astype(np.int32)
    rows = packed(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.995      # 0.99957 when this was written


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_lengths_that_fit_no_row(lengths):
    with pytest.raises(DataError, match=f"document 1 has {lengths[1]} tokens, but a row holds 1 to 10"):
        packed(lengths, 10)


# --- rows -------------------------------------------------------------------------------------------------------------


def make_source(folder, lengths, seed=0) -> Conversations:
    """Conversations of these many tokens, their tokens random and told apart by nothing; masks ragged, at least one trained."""
    random = np.random.default_rng(seed)
    with IndexedWriter(folder / f"tokens{seed}", np.uint16) as tokens, IndexedWriter(folder / f"masks{seed}", np.uint8) as masks:
        for length in lengths:
            tokens.add_document(random.integers(1, VOCAB, length))
            masks.add_document(((np.arange(length) == length - 1) | (random.random(length) < 0.5)).astype(np.uint8))
    return Conversations(IndexedCorpus(folder / f"tokens{seed}"), IndexedCorpus(folder / f"masks{seed}"), Report())


LENGTHS = [20, 5, 9, 14, 33, 2, 17, 8, 8, 12]


def dataset(source, pack, num_samples=None, **changes) -> PackedRows:
    rows = Rows(source, SEQ, pack)
    return PackedRows([rows], Order([len(rows)], None, num_samples or len(rows), changes.get("seed", 3), changes.get("one_epoch", True), ["the set"]))


def test_a_packed_row_is_its_conversations(tmp_path):
    source = make_source(tmp_path, LENGTHS)
    data = dataset(source, True)
    batch = {name: tensor.numpy() for name, tensor in data.batch(np.arange(len(data))).items()}
    assert {name: values.dtype.name for name, values in batch.items()} == {
        "tokens": "int64", "labels": "int64", "loss_mask": "float32", "position_ids": "int64", "segment_ids": "int32", "row": "int64"}
    assert batch["row"].tolist() == list(range(len(data)))
    found = []
    for k in range(len(data)):
        places, is_full = 0, data.longest(np.array([k])) == SEQ
        for segment in range(batch["segment_ids"][k].max() + is_full):
            here = batch["segment_ids"][k] == segment
            assert np.array_equal(np.flatnonzero(here), np.arange(places, places + here.sum()))      # one stretch, behind the one before
            assert np.array_equal(batch["position_ids"][k][here], np.arange(here.sum()))
            assert np.array_equal(batch["tokens"][k][here][1:], batch["labels"][k][here][:-1])
            found.append((*batch["tokens"][k][here], batch["labels"][k][here][-1]))
            mask = next(source.masks.get(i) for i in range(len(LENGTHS)) if tuple(source.tokens.get(i)) == found[-1])
            assert np.array_equal(batch["loss_mask"][k][here], mask[1:].astype(np.float32))
            places += here.sum()
        assert data.longest(np.array([k])) == places
        padding = slice(places, None)
        assert not batch["loss_mask"][k][padding].any() and not batch["tokens"][k][padding].any()
        assert (batch["segment_ids"][k][padding] == batch["segment_ids"][k].max()).all()
    assert sorted(found) == sorted(tuple(source.tokens.get(i)) for i in range(len(LENGTHS)))


def test_a_row_without_padding_ends_with_its_last_conversation(tmp_path):
    batch = dataset(make_source(tmp_path, [33]), True).batch(np.array([0]))
    assert batch["segment_ids"].tolist() == [[0] * SEQ] and batch["position_ids"].tolist() == [list(range(SEQ))]


def test_unpacked_rows(tmp_path):
    source = make_source(tmp_path, LENGTHS)
    data = dataset(source, False)
    batch = data.batch(np.arange(len(LENGTHS)))
    assert "segment_ids" not in batch
    order = [tuple(source.tokens.get(i)[:-1]) for i in range(len(LENGTHS))]
    where = [order.index(tuple(row[:data.longest(np.array([k]))])) for k, row in enumerate(batch["tokens"].tolist())]
    assert sorted(where) == list(range(len(LENGTHS)))
    assert [data.longest(np.array([k])) for k in range(len(LENGTHS))] == [LENGTHS[i] - 1 for i in where]
    assert data.longest(np.arange(len(LENGTHS))) == 32
    assert batch["loss_mask"].sum().item() == sum(int(source.masks.get(i)[1:].sum()) for i in range(len(LENGTHS)))
    assert all(batch["position_ids"][k, :LENGTHS[i] - 1].tolist() == list(range(LENGTHS[i] - 1)) for k, i in enumerate(where))


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_new_order_of_all_rows():
    order = Order([7], None, 30, seed=1, one_epoch=False, names=["x"])
    items = [item for _, item in order.where(np.arange(30))]
    epochs = [items[k:k + 7] for k in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    again = Order([7], None, 30, seed=1, one_epoch=False, names=["x"])
    assert [item for k in reversed(range(30)) for _, item in again.where(np.array([k]))] == items[::-1]      # asked in any order
    assert [item for _, item in Order([7], None, 30, 2, False, ["x"]).where(np.arange(30))] != items


def test_weights_decide_the_share_of_each_source():
    order = Order([5, 3], [3.0, 1.0], 40, seed=1, one_epoch=False, names=["a", "b"])
    drawn = order.where(np.arange(40))
    assert [sum(source == k for source, _ in drawn) for k in (0, 1)] == [30, 10]
    for source, size in ((0, 5), (1, 3)):
        items = [item for s, item in drawn if s == source]
        assert all(sorted(items[k:k + size]) == list(range(size)) for k in range(0, len(items) - size + 1, size))


def test_one_epoch_is_enough_or_refused():
    Order([7], None, 7, 1, True, ["data.train (a.jsonl)"])
    with pytest.raises(DataError, match=r"data.train \(a.jsonl\) holds 7 samples in one epoch, but 8 are asked for"):
        Order([7], None, 8, 1, True, ["data.train (a.jsonl)"])
    with pytest.raises(DataError, match="b holds 3 samples in one epoch, but 4 are asked for"):
        Order([100, 3], [1.0, 1.0], 8, 1, True, ["a", "b"])
    with pytest.raises(DataError, match="sample 7 is asked for"):
        Order([7], None, 7, 1, True, ["x"]).where(np.array([7]))


# --- packed equals unpacked -------------------------------------------------------------------------------------------


def loss_and_gradients(pack: bool, prefix: str):
    """On a rank: (summed loss, trained tokens, gradients of every weight) of all conversations through the real model."""
    from pathlib import Path

    import parity_table

    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = parity_table.config("dense", {}, {"seq_len": SEQ}, 1)
    place = topology.start(run)
    network = ParallelModel(run, place, parity_table.CountTokens(), "policy")
    source = Conversations(IndexedCorpus(Path(prefix) / "tokens0"), IndexedCorpus(Path(prefix) / "masks0"), Report())
    data = dataset(source, pack)
    batches = [{name: tensor for name, tensor in data.batch(np.array([k])).items()} for k in range(len(data))]
    result = network.forward_backward(batches)
    gradients = {name: parameter.main_grad.clone().numpy() for chunk in network.chunks for name, parameter in chunk.named_parameters()}
    return *result.sums["loss"], gradients, len(data)


def test_packed_rows_train_as_rows_of_their_own(tmp_path):
    source = make_source(tmp_path, LENGTHS)
    (one,), (many,) = ranks.run(1, loss_and_gradients, False, str(tmp_path)), ranks.run(1, loss_and_gradients, True, str(tmp_path))
    assert (one[3], many[3]) == (10, 4)
    assert one[1] == many[1] == sum(int(source.masks.get(i)[1:].sum()) for i in range(len(LENGTHS)))
    assert many[0] == pytest.approx(one[0], rel=1e-6)
    assert one[2].keys() == many[2].keys() and len(one[2]) > 20
    for name, gradient in one[2].items():
        assert np.linalg.norm(many[2][name] - gradient) <= 1e-6 * max(np.linalg.norm(gradient), 1e-3), name
