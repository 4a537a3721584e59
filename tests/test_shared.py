"""Rows that begin alike, computed as one: the same outputs, losses and gradients as row by row, in every layout."""

import numpy as np
import parity_table
import pytest
import ranks

SEQ = parity_table.SEQ
LAYOUTS = [(1, {}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2}), (2, {"cp": 2}), (2, {})]
# (length of the common beginning, of the first row, of the second, ...)
PAIRS = [(40, 60, 50), (30, 64, 44), (45, 46, 64), (0, 20, 30), (50, 50, 64), (1, 30, 30), (33, 40, 41), (20, 20, 20)]
FOURS = [(40, 60, 50, 41, 44), (50, 64, 52, 50, 64), (30, 33, 33, 33, 33), (1, 20, 10, 5, 7)]
GROUPS = {2: PAIRS, 4: FOURS}


def batches(dp_rank, dp, alike, seed=0):
    """Micro-batches [4, SEQ] of groups of `alike` rows; the loss mask lies behind the common beginning."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = alike * len(GROUPS[alike])
    tokens = torch.randint(0, parity_table.VOCAB, (rows, SEQ + 1), generator=generator)
    mask, ends = torch.zeros(rows, SEQ), torch.zeros(rows, dtype=torch.long)
    for i, (common, *lengths) in enumerate(GROUPS[alike]):
        for k, length in enumerate(lengths):
            row = alike * i + k
            if k:
                tokens[row, :common] = tokens[alike * i, :common]
            if k and common < min(length, lengths[0]):
                tokens[row, common] = (tokens[alike * i, common] + 1) % parity_table.VOCAB
            mask[row, max(common - 1, 0):length - 1], ends[row] = 1, length - 1
        for k, length in enumerate(lengths):
            tokens[alike * i + k, length:] = 0
    whole = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask, position_ids=torch.arange(SEQ).repeat(rows, 1), ends=ends)
    size = 4
    return [{name: t[row:row + size] for name, t in whole.items()} for row in range(dp_rank * size, rows, size * dp)]


def stage(rows_alike, head):
    import torch

    from engine.stage import Loss, Role, Stage

    class Weighted(Stage):
        roles = {"policy": Role(head=head)}

        def count(self, role, batch):
            return torch.tensor(float(len(batch["ends"])))

        def loss(self, role, output, batch):
            output = output if head == "tokens" else output.sigmoid()
            weight = 1 + torch.arange(len(output))[:, None]  # the rows of a group count differently
            return Loss(sum=-(output * weight * batch["loss_mask"]).sum())

    found = Weighted()
    found.rows_alike = rows_alike
    return found


def trained(layout, world_size, alike, merges, head, sections=None):
    """(scores under the mask, losses, norms, shards of weights, were rows merged) after three steps."""
    import torch

    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    run = parity_table.config("dense", layout, {}, world_size, sections)
    place = topology.start(run)
    model = ParallelModel(run, place, stage(alike if merges else 1, head), "policy", Role(head))
    first = batches(place.dp_rank, place.dp, alike)
    merged = "of" in model._fed(first)[0]
    scores = torch.cat(model.score(first)) * torch.cat([b["loss_mask"] for b in first])
    losses, norms = [], []
    for step in range(3):
        losses.append(model.forward_backward(batches(place.dp_rank, place.dp, alike, step)).loss)
        norms.append(model.step(lr=1e-3, number=step + 1))
    shards = [(key, shape, offset, values.numpy()) for key, shape, offset, values in checkpoint.local_shards(model)]
    return scores.numpy(), (losses, norms, shards), merged


@pytest.mark.parametrize("head", ["tokens", "scalar"])
@pytest.mark.parametrize("num_ranks, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("alike", GROUPS)
def test_one_row_equals_all(alike, num_ranks, layout, head):
    (plain_scores, *plain, merged), = ranks.run(1, trained, {}, 1, alike, False, head)
    assert not merged
    found = ranks.run(num_ranks, trained, layout, num_ranks, alike, True, head)
    assert all(rank[2] for rank in found)
    assert max(parity_table.difference(plain, [rank[1] for rank in found])) < parity_table.LIMIT
    if layout or num_ranks == 1:
        assert np.allclose(found[0][0], plain_scores, rtol=1e-5, atol=1e-6) and (plain_scores != 0).any()


@pytest.mark.parametrize("sections", [{"tune": {"neftune_alpha": 1.0}}, {"lora": {"rank": 2, "dropout": 0.1}}], ids=str)
def test_what_depends_on_places_or_chance_is_computed_row_by_row(sections):
    assert ranks.run(1, is_shared, sections) == [False]
    assert ranks.run(1, is_shared, {}) == [True]


def is_shared(sections):
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = parity_table.config("dense", {}, {}, 1, sections)
    return ParallelModel(run, topology.start(run), stage(2, "tokens"), "policy").rows_alike == 2


def test_a_merged_row_is_trunk_and_both_ends():
    import torch

    from engine.mcore import shared

    tokens = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 4, 0, 0]])
    batch = {"tokens": tokens, "labels": tokens + 10, "loss_mask": torch.tensor([[0, 0, 1, 1, 0, 0.], [0, 0, 1, 0, 0, 0]]),
             "position_ids": torch.arange(6).repeat(2, 1), "ends": torch.tensor([4, 3])}
    assert shared.width(batch, 2) == 7
    merged = shared.merge(batch, 8, 2)
    assert merged["tokens"].tolist() == [[5, 6, 7, 8, 9, 7, 4, 0]] and merged["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert merged["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 3]] and merged["labels"].tolist() == [[15, 16, 17, 18, 19, 17, 14, 0]]
    assert merged["loss_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]]
    back = shared.unfold(torch.arange(8.0)[None], merged)
    assert back[0, :5].tolist() == [0, 1, 2, 3, 4] and back[1, :4].tolist() == [0, 1, 5, 6]
