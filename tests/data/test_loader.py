"""Micro-batches: same data for any number of ranks, resume at any sample, masks at EOD, prefetching, refusals."""

import threading
import time

import numpy as np
import pytest
import torch

from engine.data.indexed import DataError
from engine.data import loader
from engine.data.loader import Prefetcher
from engine.data.pretraining import GPTSamples
from engine.data.text import NextToken

EOD = 7


class Loader(loader.Loader):
    """A loader over the next-token batches of samples."""

    def __init__(self, samples, micro_batch, dp_rank, dp_size, **options):
        super().__init__(NextToken(samples, **options), micro_batch, dp_rank, dp_size)



@pytest.fixture
def samples(make_corpus):
    """Samples of 16 tokens with an EOD about every fourth token."""
    return GPTSamples(make_corpus([23] * 60, vocab_size=11), np.arange(60), None, 16, 1, "train")


def whole(loader_batches):
    return torch.cat([batch["tokens"] for batch in loader_batches])


def test_micro_batches_hold_the_documented_samples(samples):
    for micro_batch, dp_size, dp_rank in [(1, 1, 0), (2, 3, 1), (4, 2, 1), (3, 4, 3)]:
        global_batch, first = 24, 17
        loader = Loader(samples, micro_batch, dp_rank, dp_size)
        batches = loader.batches(first, global_batch)
        assert len(batches) == global_batch // (micro_batch * dp_size)
        for m, batch in enumerate(batches):
            numbers = [first + m * micro_batch * dp_size + dp_rank * micro_batch + i for i in range(micro_batch)]
            text = torch.from_numpy(samples.gather(np.array(numbers)))
            assert torch.equal(batch["tokens"], text[:, :-1]) and torch.equal(batch["labels"], text[:, 1:])


def test_global_batch_does_not_depend_on_dp_size(samples):
    expected = samples.gather(np.arange(48, 72))[:, :-1]
    for micro_batch, dp_size in [(1, 1), (4, 1), (1, 8), (2, 4), (3, 2), (12, 2), (24, 1)]:
        ranks = [Loader(samples, micro_batch, r, dp_size).batches(48, 24) for r in range(dp_size)]
        in_order = torch.cat([rank[m]["tokens"] for m in range(len(ranks[0])) for rank in ranks])
        assert np.array_equal(in_order.numpy(), expected)


def test_resume_at_any_sample_with_other_ranks_and_batch(samples):
    straight = torch.cat([whole(Loader(samples, 1, 0, 1).batches(k, 1)) for k in range(40)])
    for stop in range(0, 40, 4):
        resumed = [Loader(samples, 2, r, 2).batches(stop, 4) for r in range(2)]
        rows = torch.cat([rank[m]["tokens"] for m in range(1) for rank in resumed])
        assert torch.equal(rows, straight[stop : stop + 4])


def test_a_used_loader_equals_a_new_one(samples):
    used = Loader(samples, 2, 0, 1, eod_id=EOD, reset_at_eod=True)
    used.batches(0, 8), used.batches(30, 2)
    for a, b in zip(used.batches(4, 4), Loader(samples, 2, 0, 1, eod_id=EOD, reset_at_eod=True).batches(4, 4)):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_types_shapes_and_plain_masks(samples):
    (batch,) = Loader(samples, 3, 0, 1).batches(0, 3)
    assert {k: v.dtype for k, v in batch.items()} == {
        "tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64,
    }  # fmt: skip
    assert all(v.shape == (3, 16) and v.is_contiguous() for v in batch.values())
    assert batch["loss_mask"].min() == 1
    assert torch.equal(batch["position_ids"], torch.arange(16).expand(3, 16))


def reset_by_hand(tokens):
    positions, segments, position, segment = [], [], 0, 0
    for token in tokens:
        positions.append(position)
        segments.append(segment)
        position += 1
        if token == EOD:
            position, segment = 0, segment + 1
    return positions, segments


def test_resets_at_eod_equal_a_plain_loop(samples):
    (batch,) = Loader(samples, 80, 0, 1, eod_id=EOD, reset_at_eod=True, eod_mask_loss=True).batches(0, 80)
    assert batch["segment_ids"].dtype == torch.int32 and batch["position_ids"].dtype == torch.int64
    seen = set()
    for i, tokens in enumerate(batch["tokens"].tolist()):
        positions, segments = reset_by_hand(tokens)
        assert batch["position_ids"][i].tolist() == positions
        assert batch["segment_ids"][i].tolist() == segments
        assert batch["loss_mask"][i].tolist() == [float(t != EOD) for t in tokens]
        seen |= {("first", tokens[0] == EOD), ("last", tokens[-1] == EOD), ("pair", any(a == b == EOD for a, b in zip(tokens, tokens[1:])))}
    assert len(seen) == 6  # EOD at either end, twice in a row, and not


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_resets_at_eod_equal_megatrons(samples, megatron, eod_mask_loss):
    loader = Loader(samples, 40, 0, 1, eod_id=EOD, reset_at_eod=True, eod_mask_loss=eod_mask_loss)
    (batch,) = loader.batches(0, 40)
    for i in range(40):
        mask, loss_mask, positions = megatron.gpt._get_ltor_masks_and_position_ids(batch["tokens"][i], EOD, True, True, eod_mask_loss, True)
        assert torch.equal(batch["loss_mask"][i], loss_mask) and torch.equal(batch["position_ids"][i], positions)
        segments = batch["segment_ids"][i]
        may_see = (segments[:, None] == segments[None, :]) & torch.tril(torch.ones(16, 16, dtype=torch.bool))
        assert torch.equal(~mask[0], may_see)


def test_eod_mask_alone_does_not_reset(samples):
    (batch,) = Loader(samples, 4, 0, 1, eod_id=EOD, eod_mask_loss=True).batches(0, 4)
    assert "segment_ids" not in batch
    assert torch.equal(batch["position_ids"], torch.arange(16).expand(4, 16))
    assert torch.equal(batch["loss_mask"] == 0, batch["tokens"] == EOD)


# --- refusals


def test_refuses_ids_outside_the_vocabulary(samples):
    text = samples.gather(np.arange(40))
    sample, column = next((j, c) for j in range(40) for c in range(17) if text[j, c] == 10)
    Loader(samples, 1, 0, 1, vocab_size=11).batches(sample, 1)
    with pytest.raises(DataError, match=rf"sample {sample}, token {column}: id 10 is outside the vocabulary of 10 .*another tokenizer"):
        Loader(samples, 1, 0, 1, vocab_size=10).batches(sample, 1)


def test_refuses_an_id_seen_only_as_the_last_label(make_corpus):
    class OneSample:
        seq_len = 3

        def __len__(self):
            return 1

        def gather(self, numbers):
            return np.array([[1, 2, 3, self.last]])

    dataset = OneSample()
    for dataset.last in (50, -1):
        with pytest.raises(DataError, match=f"sample 0, token 3: id {dataset.last} "):
            Loader(dataset, 1, 0, 1, vocab_size=50).batches(0, 1)


def test_refuses_sizes_that_do_not_divide_and_samples_beyond_the_end(samples):
    loader = Loader(samples, 2, 0, 3)
    with pytest.raises(DataError, match=r"global_batch 8 is not a multiple of micro_batch\(2\) \* dp\(3\) = 6"):
        loader.batches(0, 8)
    for global_batch in (0, -6):
        with pytest.raises(DataError, match="not a multiple"):
            loader.batches(0, global_batch)
    size = len(samples)
    loader.batches(size - 6, 6)
    with pytest.raises(DataError, match=f"samples {size - 5} to {size} are asked for, but the dataset has {size}"):
        loader.batches(size - 5, 6)
    with pytest.raises(DataError, match="samples -1 to 4"):
        loader.batches(-1, 6)


def test_refuses_settings_that_do_not_fit(samples):
    for option in ("reset_at_eod", "eod_mask_loss"):
        with pytest.raises(DataError, match="need eod_id"):
            Loader(samples, 1, 0, 1, **{option: True})
    for micro_batch, dp_rank, dp_size in [(0, 0, 1), (1, 1, 1), (1, -1, 1), (1, 0, 0)]:
        with pytest.raises(DataError, match="expected micro_batch >= 1"):
            Loader(samples, micro_batch, dp_rank, dp_size)


# --- prefetching


def test_prefetcher_gives_the_same_batches_in_order(samples):
    loader, positions = Loader(samples, 2, 0, 1), [(0, 4), (4, 4), (8, 8), (2, 2)]
    with Prefetcher(loader, positions) as prefetcher:
        got = list(prefetcher)
    assert len(got) == 4
    for batches, position in zip(got, positions):
        assert torch.equal(whole(batches), whole(loader.batches(*position)))
        assert len(batches) == position[1] // 2


def test_prefetcher_reads_exactly_one_batch_ahead_in_another_thread(samples):
    reads, ready = [], threading.Event()

    class Spy(Loader):
        def batches(self, first_sample, global_batch):
            reads.append((first_sample, threading.current_thread() is threading.main_thread()))
            if first_sample == 4:
                ready.set()
            return super().batches(first_sample, global_batch)

    with Prefetcher(Spy(samples, 2, 0, 1), ((k, 4) for k in range(0, 40, 4))) as prefetcher:
        next(prefetcher)
        assert ready.wait(10)
        time.sleep(0.05)  # time enough to read too far
        assert reads == [(0, False), (4, False)]


def test_prefetcher_raises_where_the_batch_was_due_then_ends(samples):
    prefetcher = Prefetcher(Loader(samples, 2, 0, 1), [(0, 4), (4, 3), (8, 4)])
    assert len(next(prefetcher)) == 2
    with pytest.raises(DataError, match="global_batch 3"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)

    def positions():
        yield 0, 4
        raise RuntimeError("no more")

    prefetcher = Prefetcher(Loader(samples, 2, 0, 1), positions())
    assert len(next(prefetcher)) == 2
    with pytest.raises(RuntimeError, match="no more"):
        next(prefetcher)


def test_prefetcher_leaves_no_thread(samples):
    before = threading.active_count()
    prefetcher = Prefetcher(Loader(samples, 2, 0, 1), ((k, 4) for k in range(0, 40, 4)))
    next(prefetcher)
    assert threading.active_count() == before + 1
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(prefetcher)
