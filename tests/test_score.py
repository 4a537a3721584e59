"""ParallelModel.score and greedy: whole sequences, equal on every rank, under every way to split them; both heads."""

import numpy as np
import parity_table
import pytest
import ranks

LAYOUTS = [(2, {"cp": 2}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"tp": 2}),
           (4, {"pp": 2, "cp": 2})]


def score(layout, world_size, head="tokens", mask=None):
    """(scores, greedy hits, loss mask, loss) of three micro-batches, on a rank. mask: every so many tokens are asked for."""
    import torch

    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    run = parity_table.config("dense", layout, {}, world_size)
    place = topology.start(run)
    model = ParallelModel(run, place, parity_table.CountTokens(), "policy", Role(head, train=False))
    pieces = parity_table.batches(run, 0, 1, 0)[:3]
    for piece in pieces if mask is not None else []:
        piece["loss_mask"] = (torch.arange(parity_table.SEQ) % mask == 0).float()[None]
    hits = torch.cat(model.greedy(pieces)).numpy() if head == "tokens" else None
    loss = None if layout or head == "scalar" else model.evaluate(pieces).loss
    return torch.cat(model.score(pieces)).numpy(), hits, torch.cat([p["loss_mask"] for p in pieces]).numpy(), loss


@pytest.mark.parametrize("num_ranks, layout", LAYOUTS, ids=str)
def test_scores_equal_one_ranks_on_every_rank(num_ranks, layout):
    (expected, expected_hits, mask, loss), = ranks.run(1, score, {}, 1)
    assert expected.shape == (3, parity_table.SEQ) and expected.dtype == np.float32
    assert np.isclose(-(expected * mask).sum() / mask.sum(), loss, rtol=1e-6)
    for found, hits, _, _ in ranks.run(num_ranks, score, layout, num_ranks):
        assert np.allclose(found, expected, rtol=1e-5, atol=0)
        assert hits.dtype == bool and np.array_equal(hits, expected_hits)


@pytest.mark.parametrize("num_ranks, layout", [(1, {}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"cp": 2})], ids=str)
def test_what_is_masked_is_not_computed_and_changes_nothing_else(num_ranks, layout):
    whole, sparse = (ranks.run(num_ranks, score, layout, num_ranks, "tokens", mask)[0] for mask in (1, 3))
    mask = sparse[2] > 0
    assert mask.mean() < 0.4 and (whole[0] < 0).all()
    assert np.allclose(sparse[0][mask], whole[0][mask], rtol=1e-5) and not sparse[0][~mask].any()
    assert np.array_equal(sparse[1][mask], whole[1][mask])


@pytest.mark.parametrize("num_ranks, layout", LAYOUTS, ids=str)
def test_values_equal_one_ranks_on_every_rank(num_ranks, layout):
    (expected, *_), = ranks.run(1, score, {}, 1, "scalar")
    assert expected.shape == (3, parity_table.SEQ) and expected.dtype == np.float32 and expected.std() > 0.01
    for found, *_ in ranks.run(num_ranks, score, layout, num_ranks, "scalar"):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)


def most_probable_labels(layout, world_size):
    """Labels replaced by the arg max of the logits at every other place; hits, and where they are expected."""
    import torch

    from engine.mcore import build, topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    run = parity_table.config("dense", layout, {}, world_size)
    place = topology.start(run)
    model = ParallelModel(run, place, parity_table.CountTokens(), "policy", Role(train=False))
    batch = parity_table.batches(run, 0, 1, 0)[0]
    batch.pop("segment_ids")
    with torch.no_grad():
        logits = build.bare(model.chunks[0])(batch["tokens"], batch["position_ids"], None)  # [b, s, ids of this tp rank]
    if place.tp > 1:
        import torch.distributed as dist

        parts = [torch.empty_like(logits) for _ in range(place.tp)]
        dist.all_gather(parts, logits.contiguous())
        logits = torch.cat(parts, -1)
    best = logits[..., :parity_table.VOCAB].argmax(-1)
    is_best = torch.arange(parity_table.SEQ) % 2 == 0
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    batch["labels"] = torch.where(is_best, best, (best + 1) % parity_table.VOCAB)
    return model.greedy([batch])[0].numpy(), is_best.expand_as(best).numpy()


@pytest.mark.parametrize("num_ranks, layout", [(1, {}), (2, {"tp": 2}), (4, {"tp": 4})], ids=str)
def test_greedy_knows_the_most_probable_token(num_ranks, layout):
    for hits, expected in ranks.run(num_ranks, most_probable_labels, layout, num_ranks):
        assert np.array_equal(hits, expected)
