"""Averages of weights: the mean of what was visited, put into the model and taken out again, the same in every layout, kept over a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
from training import EOD, MOE, SEQ, VOCAB, merged, on_ranks

from engine.config import ConfigError, validate

RAW = {
    "run": {"dir": "unused", "device": "cpu", "seed": 5},
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
              "num_query_groups": 2, "vocab_size": VOCAB},
    "data": {"train": ["unused"], "eod_id": EOD},
    "train": {"seq_len": SEQ, "global_batch": 4, "steps": 6, "precision": "fp32"},
    "average": {"kind": "uniform"},
}
EMA = {"average": {"kind": "ema", "decay": 0.75}}
AUX_FREE = {"model": {"moe": {**MOE, "balance": "aux_free", "score": "sigmoid", "bias_update_rate": 0.05}}}
ZERO1 = {"parallel": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}


def start(raw, world_size):
    """On a rank: (run, ParallelModel, Average)."""
    from engine.mcore import topology
    from engine.mcore.average import Average
    from engine.mcore.run import ParallelModel
    from engine.stages.pretrain import Pretrain

    run = validate(raw, world_size)
    model = ParallelModel(run, topology.start(run), Pretrain(), "policy")
    return run, model, Average(model, run.average, run.train.steps)


def batches(model, step):
    """This replica's micro-batches of one global batch."""
    import torch

    place, size = model.topology, model.run.train.global_batch
    text = torch.randint(0, VOCAB, (size, SEQ + 1), generator=torch.Generator().manual_seed(step))
    text[:, 1::2] = text[:, :-1:2]  # every second token repeats the one before it
    whole = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(size, SEQ), "position_ids": torch.arange(SEQ).repeat(size, 1)}
    return [{name: t[row:row + 1] for name, t in whole.items()} for row in range(place.dp_rank, size, place.dp)]


def state(model) -> dict:
    """Parameters and router biases of this rank's first chunk, as float32 arrays."""
    from engine.mcore.build import bare

    model.gather_weights()
    chunk = bare(model.chunks[0])
    return {name: tensor.detach().float().numpy().copy() for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
            if tensor.is_floating_point() and not name.endswith("tokens_per_expert")}


def step(model, number) -> float:
    loss = model.forward_backward(batches(model, number)).loss
    model.step(1e-2)
    return loss


def means(average) -> dict:
    return {name: mean.numpy().copy() for name, mean in average.chunks[0].means.items()}


def visit(raw, world_size, begin=0, end=6, root=None, carry_on=False):
    """On a rank: train steps begin + 1 to end. Returns (weights after each step, means, number taken). root: resume both the model and the
    average from there at `begin`, save them there at `end`."""
    from engine.mcore import checkpoint
    from engine.mcore.checkpoint import Position

    run, model, average = start(raw, world_size)
    if carry_on:
        checkpoint.load(model, checkpoint.folder_of(f"{root}/checkpoints", begin))
        average.resume(f"{root}/average", begin)
    visited = []
    for number in range(begin + 1, end + 1):
        step(model, number)
        average.after_step(number)
        visited.append(state(model))
    if root:
        if average.num_taken:
            average.save(f"{root}/average", Position(end))
        checkpoint.save(model, f"{root}/checkpoints", Position(end))
    return visited, means(average), average.num_taken


def whole(root) -> dict:
    """The average saved under root, as whole tensors."""
    from engine.mcore.checkpoint import read_tensors

    return {name: tensor.numpy() for name, tensor in read_tensors(f"{root}/average").items()}


def assert_close(ours, theirs, rtol):
    assert ours.keys() == theirs.keys() and ours
    for name in theirs:
        assert np.linalg.norm(ours[name] - theirs[name]) <= rtol * np.linalg.norm(theirs[name]), name


# --- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, taken", [({}, [1, 2, 3, 4, 5, 6]), ({"start": 0.5}, [4, 5, 6]), ({"start": 0.3, "every": 2}, [2, 4, 6])])
def test_uniform_is_the_mean_of_the_visited_weights(settings, taken):
    visited, mean, count = ranks.run(1, visit, merged(RAW, {"average": settings}), 1)[0]
    assert count == len(taken)
    assert_close(mean, {name: np.mean([visited[n - 1][name].astype(np.float64) for n in taken], axis=0) for name in mean}, 1e-7)
    assert np.abs(mean["output_layer.weight"] - visited[-1]["output_layer.weight"]).max() > 1e-3  # the weights do move


def test_ema_follows_its_formula():
    visited, mean, count = ranks.run(1, visit, merged(RAW, EMA, {"average": {"start": 0.2}}), 1)[0]
    expected = {name: visited[1][name].astype(np.float64) for name in mean}
    for weights in visited[2:]:
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in mean}
    assert count == 5
    assert_close(mean, expected, 1e-7)


def test_the_bias_of_a_router_is_averaged_with_it():
    visited, mean, _ = ranks.run(1, visit, merged(RAW, AUX_FREE), 1)[0]
    (name,) = {name for name in mean if name.endswith("layers.0.mlp.router.expert_bias")}
    assert np.abs(visited[-1][name]).max() > 0
    assert np.allclose(mean[name], np.mean([weights[name] for weights in visited], axis=0), rtol=1e-6, atol=1e-8)


def idle(raw):
    run, model, average = start(raw, 1)
    average.after_step(1)
    average.resume("/nowhere", 6)
    return average.num_taken, len(average.chunks)


def test_kind_none_holds_nothing():
    assert ranks.run(1, idle, merged(RAW, {"average": {"kind": "none"}}))[0] == (0, 0)


# --- in the model ------------------------------------------------------------------------------------------------------


def swap(raw, world_size, is_swapping):
    """On a rank: (losses, weights before the last swap, in it, after it, the means, validation losses in and out of it)."""
    run, model, average = start(raw, world_size)
    losses, held = [], (None,) * 5
    for number in range(1, 5):
        losses.append(step(model, number))
        average.after_step(number)
        if is_swapping:
            before, outside = state(model), model.evaluate(batches(model, 100)).loss
            with average.swapped():
                inside, averaged = model.evaluate(batches(model, 100)).loss, state(model)
            held = before, averaged, state(model), means(average), (inside, outside)
    return losses, *held


@pytest.mark.parametrize("num_ranks, change", [(1, {}), (1, {"train": {"precision": "bf16"}}), (2, ZERO1),
                                               (2, {**ZERO1, "train": {"precision": "bf16"}})], ids=["fp32", "bf16", "zero1", "bf16 zero1"])
def test_a_swap_leaves_no_trace(num_ranks, change):
    """The live weights come back bit for bit, and training goes on as if nothing had happened."""
    import torch

    raw = merged(RAW, change)
    plain = ranks.run(num_ranks, swap, raw, num_ranks, False)[0][0]
    for losses, before, averaged, after, mean, (inside, outside) in ranks.run(num_ranks, swap, raw, num_ranks, True):
        assert losses == plain
        dtype = torch.bfloat16 if raw["train"]["precision"] == "bf16" else torch.float32
        for name in mean:
            assert np.array_equal(before[name], after[name]), name
            assert np.array_equal(averaged[name], torch.from_numpy(mean[name]).to(dtype).float().numpy()), name
        assert inside != outside and abs(inside - outside) < 1


def fail_inside(raw):
    """On a rank: are the live weights back when something fails while the average is in the model?"""
    run, model, average = start(raw, 1)
    for number in (1, 2):
        step(model, number)
        average.after_step(number)
    before = state(model)
    try:
        with average.swapped():
            raise KeyError
    except KeyError:
        after = state(model)
    return all(np.array_equal(before[name], after[name]) for name in before)


def test_a_failure_inside_a_swap_puts_the_weights_back():
    assert ranks.run(1, fail_inside, RAW)[0]


# --- layouts and resuming ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "tp2 sp": {"parallel": {"tp": 2, "sequence_parallel": True}},
    "zero1": ZERO1,
    "pp2 vpp2": {"parallel": {"pp": 2, "vpp": 2}},
}
# AdamW's epsilon as in tests/parity_table.py: rounding, which differs between processors, must not become a full step.
FOUR_LAYERS = merged(RAW, AUX_FREE, {"model": {"num_layers": 4, "tie_embeddings": True}, "optim": {"eps": 1e-5}})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    root = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, visit, FOUR_LAYERS, 1, 0, 4, str(root))
    return whole(root)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_average_alike(tmp_path, one_rank, name):
    ranks.run(2, visit, merged(FOUR_LAYERS, LAYOUTS[name]), 2, 0, 4, str(tmp_path))
    assert_close(whole(tmp_path), one_rank, 1e-5)


@pytest.mark.parametrize("change", [{}, merged(EMA, {"train": {"precision": "bf16"}})], ids=["uniform", "ema bf16"])
def test_a_resumed_average_is_bit_equal(tmp_path, change):
    raw = merged(RAW, change, {"average": {"start": 0.15}})
    _, expected, count = ranks.run(1, visit, raw, 1)[0]
    ranks.run(1, visit, raw, 1, 0, 3, str(tmp_path))
    _, mean, resumed = ranks.run(1, visit, raw, 1, 3, 6, str(tmp_path), True)[0]
    assert resumed == count == 6 and all(np.array_equal(mean[name], expected[name]) for name in expected)
    assert all(tensor.dtype == np.float32 for tensor in whole(tmp_path).values())


def test_an_average_resumes_in_another_layout(tmp_path):
    """One rank for two steps, then two tensor-parallel ranks; against one rank throughout."""
    one, moved = tmp_path / "one", tmp_path / "moved"
    ranks.run(1, visit, RAW, 1, 0, 4, str(one))
    ranks.run(1, visit, RAW, 1, 0, 2, str(moved))
    ranks.run(2, visit, merged(RAW, LAYOUTS["tp2 sp"]), 2, 2, 4, str(moved), True)
    assert_close(whole(moved), whole(one), 1e-5)


def test_nothing_is_read_before_the_first_taking(tmp_path):
    raw = merged(RAW, {"average": {"start": 0.5}})
    assert ranks.run(1, visit, raw, 1, 0, 3, str(tmp_path))[0][2] == 0
    assert not (tmp_path / "average").exists()
    assert ranks.run(1, visit, raw, 1, 3, 6, str(tmp_path), True)[0][2] == 3


def test_an_average_that_cannot_go_on_is_refused(tmp_path):
    ranks.run(1, visit, RAW, 1, 0, 2, str(tmp_path))
    with pytest.raises(ranks.RankError, match="is an average of kind uniform, but average.kind=ema"):
        ranks.run(1, visit, merged(RAW, EMA), 1, 2, 4, str(tmp_path), True)
    (tmp_path / "average" / "iter_0000002" / "average.json").unlink()
    with pytest.raises(ranks.RankError, match="CheckpointError: .*average.json cannot be read .*average.start"):
        ranks.run(1, visit, RAW, 1, 2, 4, str(tmp_path), True)


@pytest.mark.parametrize("change, words", [
    ({"average": {"every": 7}}, r"average.every\(7\) after average.start\(0.0\) of 6 steps takes no weights"),
    ({"average": {"every": 3, "start": 0.99}, "train": {"steps": 100}}, "takes no weights"),
    ({"parallel": {"zero1": True}, "train": {"precision": "bf16", "fp8": {"recipe": "delayed", "params": True}}}, "average.kind needs parameters"),
])  # fmt: skip
def test_settings_that_average_nothing_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        validate(merged(RAW, change))


# --- in the loop -------------------------------------------------------------------------------------------------------

AVERAGE = {"average": {"kind": "uniform", "start": 0.3}, "checkpoint": {"save_every": 3}, "train": {"eval_every": 1}}


def validations(raw):
    lines = [json.loads(line) for line in Path(raw["run"]["dir"], "metrics.jsonl").read_text().splitlines()]
    return {(line["split"], line["step"]): line["valid_loss"] for line in lines if "split" in line}


def test_the_average_is_validated_and_changes_no_step(raw_run, tmp_path):
    raw, plain = merged(raw_run, AVERAGE), merged(raw_run, {"run": {"dir": str(tmp_path / "plain")}})
    assert [line["loss"] for line in on_ranks(1, raw)] == [line["loss"] for line in on_ranks(1, plain)]
    losses = validations(raw)
    assert [step for name, step in losses if name == "held_out/average"] == [2, 3, 4, 5, 6]
    assert losses["held_out/average", 2] == losses["held_out", 2] and losses["held_out/average", 6] != losses["held_out", 6]
    assert sorted(f.name for f in Path(raw["run"]["dir"], "average").glob("iter_*")) == ["iter_0000003", "iter_0000006"]


@pytest.mark.parametrize("change", [ZERO1, {"parallel": {"pp": 2}}], ids=["zero1", "pp2"])
def test_a_run_that_moves_to_another_layout_keeps_its_average(raw_run, tmp_path, change):
    fixed = {"average": {"start": 0}, "schedule": {"decay_steps": 6}}  # a start at a share of the steps would move with train.steps
    one, moved = (merged(raw_run, AVERAGE, fixed, {"run": {"dir": str(tmp_path / folder)}}) for folder in ("one", "moved"))
    on_ranks(1, one)
    on_ranks(1, merged(moved, {"train": {"steps": 3}}))
    on_ranks(2, merged(moved, change))
    assert_close(whole(moved["run"]["dir"]), whole(one["run"]["dir"]), 1e-5)
    assert json.loads((tmp_path / "moved" / "average" / "iter_0000006" / "average.json").read_text())["num_taken"] == 6


def test_averaging_begins_afresh_where_the_position_was_loaded(raw_run, tmp_path):
    """A new run.dir that goes on at step 6 of another run has no average to resume, and none is looked for."""
    on_ranks(1, raw_run)
    new = merged(raw_run, AVERAGE, {"run": {"dir": str(tmp_path / "new")}, "checkpoint": {"load": raw_run["run"]["dir"]}, "train": {"steps": 9}})
    on_ranks(1, new)
    assert json.loads((tmp_path / "new" / "average" / "iter_0000009" / "average.json").read_text())["num_taken"] == 3


def test_an_average_is_a_start_for_another_run(raw_run, tmp_path):
    """Saved in fp32 by a run in bf16, read by one in bf16."""
    raw = merged(raw_run, AVERAGE, {"train": {"precision": "bf16"}})
    on_ranks(1, raw)
    new = merged(raw, {"run": {"dir": str(tmp_path / "new")}, "checkpoint": {"load": f"{raw['run']['dir']}/average", "load_optimizer": False},
                       "schedule": {"warmup_steps": 1}, "train": {"steps": 1}, "average": {"kind": "none"}})
    new["schedule"] = {"kind": "constant", "warmup_steps": 1}  # step 1 runs at rate 0
    on_ranks(1, new)
    assert validations(new)["held_out", 1] == validations(raw)["held_out/average", 6]
