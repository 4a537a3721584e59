"""Batches through NVIDIA DALI, on the CPU: what comes out is what went in, and a run trains as it does without. `make test-extras` installs it."""

import importlib.util

import pytest
import ranks
import torch
from training import merged, train

from engine.data import feed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
                                reason="NVIDIA DALI is not installed; make test-extras installs it")


def batch(rows, seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(0, 2**40, (rows, seq_len), generator=generator), "loss_mask": torch.rand((rows, seq_len), generator=generator),
            "segment_ids": torch.randint(0, 9, (rows, seq_len), generator=generator, dtype=torch.int32),
            "is_desirable": torch.rand(rows, generator=generator) < 0.5, "row": torch.arange(rows) + seed}


def test_what_comes_out_is_what_went_in_and_stays_so():
    """Shapes that change, several dtypes, tensors of one number per row; the outputs of a pipeline that ran again meanwhile."""
    copies = feed.Dali("cpu")
    batches = [batch(rows, seq_len, seed) for seed, (rows, seq_len) in enumerate([(4, 7), (4, 5), (4, 7), (2, 7), (1, 64)])]
    copies.start(batches[:3])
    copies.start(batches[3:])
    for one in batches:
        for tensor in one.values():
            copy = copies.of(tensor)
            assert copy.dtype == tensor.dtype and torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
    own = torch.arange(3)
    assert copies.of(own) is own  # nothing that was started; already where it is wanted


def through_dali(raw, world_size):
    """On a rank: training lines, and how many tensors of batches DALI has moved."""
    moved, honest = [], feed.Dali.start

    def start(self, micro_batches):
        honest(self, micro_batches)
        moved.extend(self.of(tensor).data_ptr() != tensor.data_ptr() for one in micro_batches for tensor in one.values())

    feed.Dali.start = start
    try:
        return train(raw, world_size), sum(moved)
    finally:
        feed.Dali.start = honest


def test_a_run_trains_as_without(raw_run):
    raw = merged(raw_run, {"train": {"eval_samples": 4}})
    plain = ranks.run(1, train, raw, 1)[0]
    lines, moved = ranks.run(1, through_dali, merged(raw, {"run": {"dir": raw["run"]["dir"] + "-dali"}, "data": {"feed": "dali"}}), 1)[0]
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(line["loss"], line["grad_norm"]) for line in plain]
    assert moved == 6 * 4 * 5  # every tensor of every micro-batch of training
