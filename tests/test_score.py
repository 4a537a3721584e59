"""ParallelModel.score: log-probabilities of the labels, whole and equal on every rank, under every way to split the sequence."""

import numpy as np
import parity_table
import pytest
import ranks


def score(layout, world_size):
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = parity_table.config("dense", layout, {}, world_size)
    place = topology.start(run)
    model = ParallelModel(run, place, parity_table.CountTokens(), "policy", train=False)
    import torch

    pieces = parity_table.batches(run, 0, 1, 0)[:3]
    batch = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return model.score(batch).numpy(), batch["loss_mask"].numpy(), None if layout else model.evaluate(pieces).loss


@pytest.mark.parametrize("num_ranks, layout", [(2, {"cp": 2}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2}), (2, {"tp": 2, "sequence_parallel": True}),
                                              (4, {"pp": 2, "cp": 2})], ids=str)
def test_scores_equal_one_ranks_on_every_rank(num_ranks, layout):
    (expected, mask, loss), = ranks.run(1, score, {}, 1)
    assert expected.shape == (3, parity_table.SEQ) and expected.dtype == np.float32
    assert np.isclose(-(expected * mask).sum() / mask.sum(), loss, rtol=1e-6)
    for found, _, _ in ranks.run(num_ranks, score, layout, num_ranks):
        assert np.allclose(found, expected, rtol=1e-5, atol=0)
