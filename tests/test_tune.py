"""The tune section: what is frozen stays, rates fall with depth, layers come free one by one, weights are pulled back, noise is the
same in every layout; and a vocabulary that grows."""

import numpy as np
import parity_table
import pytest
import ranks
from training import merged, on_ranks

LAYOUTS = [(2, {}), (2, {"zero1": True}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"pp": 2}), (2, {"cp": 2})]


def weights(model="dense", **tune):
    """Whole weights at the start and after each of parity_table.STEPS steps, on one rank."""
    results = ranks.run(1, start_and_end, model, {"tune": tune})
    return results[0]


def start_and_end(model, sections):
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel

    run = parity_table.config(model, {}, {}, 1, sections)
    place = topology.start(run)
    network = ParallelModel(run, place, parity_table.CountTokens(), "policy")
    if network.pull:
        network.pull.remember(network.chunks)
    trail = [_whole(checkpoint, network)]
    for step in range(parity_table.STEPS):
        network.forward_backward(parity_table.batches(run, 0, 1, step))
        network.step(lr=1e-2, number=step + 1)
        trail.append(_whole(checkpoint, network))
    return trail


def _whole(checkpoint, network):
    """Name -> weights, the layers of one kind stacked along the first axis."""
    found = {}
    for key, shape, offset, values in checkpoint.local_shards(network):
        place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
        found.setdefault(key, np.zeros(shape, np.float32))[place] = values.numpy()
    return found


def moved(before, after) -> dict:
    """Name -> did it change; stacked tensors by layer."""
    changes = {}
    for name in before:
        if "decoder.layers." in name:
            changes.update({name.replace("layers.", f"layers.{i}."): not np.array_equal(a, b) for i, (a, b) in enumerate(zip(before[name], after[name]))})
        else:
            changes[name] = not np.array_equal(before[name], after[name])
    return changes


@pytest.mark.parametrize("model, freeze, is_frozen", [
    ("dense", ["embedding"], lambda n: n.startswith("embedding")),
    ("dense", ["layers:0-2"], lambda n: any(f"layers.{i}." in n for i in range(3))),
    ("dense", ["layers:1", "output"], lambda n: "layers.1." in n or n.startswith("output_layer")),
    ("dense", ["layers", "norms"], lambda n: "layers." in n or "norm" in n),
    ("tied", ["embedding"], lambda n: n.startswith("embedding")),
    ("moe", ["router", "embedding"], lambda n: ".router." in n or n.startswith("embedding")),
    ("moe", ["experts"], lambda n: ".experts." in n),
], ids=lambda value: value.__name__ if callable(value) else str(value))
def test_frozen_parts_stay_and_all_others_move(model, freeze, is_frozen):
    trail = weights(model, freeze=freeze)
    changes = moved(trail[0], trail[-1])
    assert any(is_frozen(name) for name in changes) and not all(is_frozen(name) for name in changes)
    assert changes == {name: not is_frozen(name) for name in changes}


def test_gradual_unfreezing_frees_one_more_layer_at_a_time():
    """Four layers, a stride of one step: step k frees k layers from the top, step 5 the embedding."""
    trail = weights(unfreeze_every=1)
    for step, (before, after) in enumerate(zip(trail, trail[1:]), 1):
        for name, has_moved in moved(before, after).items():
            layer = next((i for i in range(4) if f"layers.{i}." in name), None)
            expected = step > 4 if name.startswith("embedding") else layer is None or layer >= 4 - step
            assert has_moved == expected, (step, name)


def test_rates_fall_with_depth():
    """Adam's first step is the rate times the sign of the gradient (weight decay and epsilon aside)."""
    before, after, *_ = weights(layer_lr_decay=0.5)
    norm = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    by_layer = [np.abs(a - b).max() for a, b in zip(after[norm], before[norm])]
    assert np.allclose(by_layer, [1e-2 * 0.5**(3 - i) for i in range(4)], rtol=0.02)
    top = np.abs(after["decoder.final_layernorm.weight"] - before["decoder.final_layernorm.weight"]).max()
    assert np.isclose(top, 1e-2, rtol=0.02)
    embedding = "embedding.word_embeddings.weight"
    assert np.abs(after[embedding] - before[embedding]).max() < 1e-2 * 0.5**4 * 1.05


def gradients(sections):
    """main_grad of the final norm after one batch and the pull, and the distance from the start."""
    import torch

    from engine.mcore import topology
    from engine.mcore.build import bare
    from engine.mcore.run import ParallelModel

    run = parity_table.config("dense", {}, {}, 1, sections)
    network = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")
    weight = bare(network.chunks[0]).decoder.final_layernorm.weight
    network.pull.remember(network.chunks)
    with torch.no_grad():
        weight.add_(0.25)
    network.forward_backward(parity_table.batches(run, 0, 1, 0))
    plain = weight.main_grad.clone()
    network.pull.add_gradient(network.chunks, 1.0)
    return plain.numpy(), weight.main_grad.numpy()


def test_l2_to_init_adds_its_gradient():
    (plain, pulled), = ranks.run(1, gradients, {"tune": {"l2_to_init": 0.3}})
    assert np.abs(plain).max() > 0 and np.allclose(pulled - plain, 0.3 * 0.25, rtol=1e-4)


def test_l2_to_init_keeps_weights_nearer_to_their_start():
    distance = {pull: sum(np.square(trail[-1][n] - trail[0][n]).sum() for n in trail[0])
                for pull in (0.0, 10.0) for trail in [weights(l2_to_init=pull)]}
    assert distance[10.0] < 0.7 * distance[0.0]


ALL = {"freeze": ["layers:0"], "layer_lr_decay": 0.7, "l2_to_init": 0.1, "neftune_alpha": 5.0}


@pytest.mark.parametrize("tune", [ALL, {"unfreeze_every": 2}], ids=["all", "unfreeze"])
@pytest.mark.parametrize("num_ranks, layout", LAYOUTS, ids=str)
def test_tuning_is_the_same_in_every_layout(num_ranks, layout, tune):
    sections = {"tune": tune}
    one = ranks.run(1, parity_table.train, "dense", {}, {}, 1, sections)
    found = ranks.run(num_ranks, parity_table.train, "dense", layout, {}, num_ranks, sections)
    assert max(parity_table.difference(one, found)) < parity_table.LIMIT


def test_noise_changes_training_and_not_evaluation():
    quiet, noisy = (ranks.run(1, parity_table.train, "dense", {}, {}, 1, {"tune": {"neftune_alpha": alpha}})[0][0] for alpha in (0.0, 5.0))
    assert abs(quiet[0] - noisy[0]) > 1e-4
    a, b = (ranks.run(1, evaluated, {"tune": {"neftune_alpha": alpha}})[0] for alpha in (0.0, 5.0))
    assert a == b


def evaluated(sections):
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = parity_table.config("dense", {}, {}, 1, sections)
    network = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")
    return network.evaluate(parity_table.batches(run, 0, 1, 0)).loss


def embeddings_after_growth(raw, world_size, source):
    """Loads `source` into a model of a larger vocabulary; this rank's rows of both matrices, and the loss of a batch."""
    from engine.config import validate
    from engine.mcore import checkpoint, topology
    from engine.mcore.build import bare
    from engine.mcore.run import ParallelModel

    run = validate(raw, world_size)
    network = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")
    checkpoint.load(network, checkpoint.find(source), optimizer=False)
    chunk = bare(network.chunks[0])
    return chunk.embedding.word_embeddings.weight.detach().numpy(), chunk.output_layer.weight.detach().numpy()


@pytest.mark.parametrize("num_ranks, layout, multiple", [(1, {}, 1), (2, {"tp": 2}, 2), (2, {"tp": 2}, 128)], ids=str)
def test_a_larger_vocabulary_keeps_old_rows_and_starts_new_ones_at_their_mean(raw_run, tmp_path, num_ranks, layout, multiple):
    from engine.mcore.checkpoint import read_tensors

    on_ranks(1, merged(raw_run, {"model": {"vocab_pad_multiple": 1}}))
    old = read_tensors(raw_run["run"]["dir"])
    larger = merged(raw_run, {"model": {"vocab_size": 90, "vocab_pad_multiple": multiple}, "parallel": layout})
    found = ranks.run(num_ranks, embeddings_after_growth, larger, num_ranks, raw_run["run"]["dir"])
    for part, name in enumerate(("embedding.word_embeddings.weight", "output_layer.weight")):
        whole, before = np.concatenate([rank[part] for rank in found]), old[name].numpy()
        assert before.shape[0] == 61 and np.array_equal(whole[:61], before)
        assert np.allclose(whole[61:90], before.mean(0), atol=1e-6)


def test_growth_can_be_refused_and_never_takes_old_moments(raw_run, tmp_path):
    on_ranks(1, raw_run)
    larger = merged(raw_run, {"run": {"dir": str(tmp_path / "x")}, "model": {"vocab_size": 90}, "checkpoint": {"load": raw_run["run"]["dir"]}})
    with pytest.raises(ranks.RankError, match="has 61 tokens and this run 90, so the optimizer's state does not fit; set checkpoint.load_optimizer=false"):
        on_ranks(1, larger)
    with pytest.raises(ranks.RankError, match="model.vocab_size is 90, the checkpoint has 61"):
        on_ranks(1, merged(larger, {"checkpoint": {"grow_vocab": False, "load_optimizer": False}}))
    smaller = merged(larger, {"model": {"vocab_size": 50}, "checkpoint": {"load_optimizer": False}})
    with pytest.raises(ranks.RankError, match="model.vocab_size is 50, the checkpoint has 61"):
        on_ranks(1, smaller)


def test_a_run_with_a_pull_resumes_with_the_same_start(raw_run):
    pulled = merged(raw_run, {"tune": {"l2_to_init": 1.0}, "schedule": {"decay_steps": 6}})
    straight = on_ranks(1, merged(pulled, {"run": {"dir": raw_run["run"]["dir"] + "-straight"}}))
    on_ranks(1, merged(pulled, {"train": {"steps": 3}}))
    resumed = on_ranks(1, pulled)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]
