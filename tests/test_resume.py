"""Stopping and resuming: bit-equal in the same layout, within 1e-5 in another, nothing read twice or lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
from training import MOE, merged, on_ranks

DROPOUT = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
LAYOUTS = {
    "one rank": (1, {}),
    "dropout": (1, DROPOUT),
    "tp2 sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "tp2 dropout": (2, {"parallel": {"tp": 2, "sequence_parallel": True}, **DROPOUT}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "zero1": (2, {"parallel": {"zero1": True}}),
    "zero1 overlap": (2, {"parallel": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "bf16 zero1": (2, {"parallel": {"zero1": True}, "train": {"precision": "bf16"}}),
    "bf16": (1, {"train": {"precision": "bf16"}}),
    "fp16": (1, {"train": {"precision": "fp16"}, "optim": {"initial_loss_scale": 1024.0}}),
    "moe ep2": (2, {"parallel": {"ep": 2}, "model": {"moe": MOE}}),
    "moe pp2 vpp2": (2, {"parallel": {"pp": 2, "vpp": 2}, "model": {"moe": MOE, "num_layers": 4}}),
    "moe bias zero1": (2, {"parallel": {"zero1": True}, "model": {"moe": {**MOE, "balance": "aux_free", "score": "sigmoid"}}}),
}


def losses(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_layout_resumes_bit_equal(raw_run, tmp_path, name):
    num_ranks, change = LAYOUTS[name]
    unbroken = merged(raw_run, change, {"run": {"dir": str(tmp_path / "unbroken")}})
    broken = merged(raw_run, change, {"run": {"dir": str(tmp_path / "broken")}})
    expected = losses(on_ranks(num_ranks, unbroken))
    on_ranks(num_ranks, merged(broken, {"train": {"steps": 3}, "schedule": {"decay_steps": 6}}))
    assert losses(on_ranks(num_ranks, broken)) == expected
    assert len(expected) == 6


def test_other_layouts_resume_within_1e_5(raw_run, tmp_path):
    """TP2 -> PP2 -> DP2: two steps each, against one rank's six."""
    expected = on_ranks(1, merged(raw_run, {"run": {"dir": str(tmp_path / "one")}}))
    run = merged(raw_run, {"run": {"dir": str(tmp_path / "moving")}, "schedule": {"decay_steps": 6}})
    for steps, layout in ((2, {"tp": 2, "sequence_parallel": True}), (4, {"pp": 2}), (6, {})):
        lines = on_ranks(2, merged(run, {"train": {"steps": steps}, "parallel": layout}))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm"):
        assert np.allclose([line[key] for line in lines], [line[key] for line in expected], rtol=1e-5, atol=0)
    assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 24]


def test_a_moe_model_moves_between_ep_and_tp(raw_run, tmp_path):
    change = {"model": {"moe": MOE}, "run": {"dir": str(tmp_path / "moving")}, "schedule": {"decay_steps": 6}}
    expected = on_ranks(1, merged(raw_run, change, {"run": {"dir": str(tmp_path / "one")}}))
    for steps, layout in ((2, {"ep": 2}), (4, {"tp": 2, "sequence_parallel": True, "etp": 1}), (6, {"cp": 2})):
        lines = on_ranks(2, merged(raw_run, change, {"train": {"steps": steps}, "parallel": layout}))
    assert np.allclose([line["loss"] for line in lines], [line["loss"] for line in expected], rtol=1e-5, atol=0)


def test_an_incomplete_checkpoint_is_passed_over(raw_run):
    on_ranks(1, merged(raw_run, {"checkpoint": {"save_every": 2}}))
    root = Path(raw_run["run"]["dir"]) / "checkpoints"
    assert sorted(f.name for f in root.iterdir()) == ["iter_0000002", "iter_0000004", "iter_0000006", "latest_checkpointed_iteration.txt"]
    (root / "iter_0000006" / "metadata.json").unlink()
    lines = on_ranks(1, merged(raw_run, {"train": {"steps": 7}, "schedule": {"decay_steps": 8}}))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((Path(raw_run["run"]["dir"]) / "status.json").read_text())["state"] == "done"


def test_weights_alone_start_a_new_run(raw_run, tmp_path):
    raw_run = merged(raw_run, {"train": {"steps": 40}})
    first = on_ranks(1, raw_run)
    new = merged(raw_run, {"run": {"dir": str(tmp_path / "new")}, "checkpoint": {"load": raw_run["run"]["dir"], "load_optimizer": False}})
    lines = on_ranks(1, new)
    assert lines[0]["step"] == 1 and lines[0]["consumed_samples"] == 4
    assert lines[0]["loss"] < first[0]["loss"] - 0.5  # the same samples, seen by trained weights


def test_another_model_is_refused_by_name(raw_run, tmp_path):
    on_ranks(1, raw_run)
    other = merged(raw_run, {"run": {"dir": str(tmp_path / "x")}, "model": {"ffn_hidden_size": 64}, "checkpoint": {"load": raw_run["run"]["dir"]}})
    with pytest.raises(ranks.RankError, match="holds another model: model.ffn_hidden_size is 64, the checkpoint has 48"):
        on_ranks(1, other)


def test_overlapped_gathers_change_neither_losses_nor_saved_weights(raw_run, tmp_path):
    """With overlap_param_gather a rank's weights are complete only once they were gathered; saving in mid-run must not matter."""
    from engine.mcore.checkpoint import read_tensors

    runs = {name: merged(raw_run, {"run": {"dir": str(tmp_path / name)}, "parallel": {"zero1": True, **layout}, "checkpoint": {"save_every": every}})
            for name, layout, every in (("plain", {}, 0), ("overlap", {"overlap_grad_reduce": True, "overlap_param_gather": True}, 2))}
    plain, overlap = (losses(on_ranks(2, run)) for run in runs.values())
    assert plain == overlap
    plain, overlap = (read_tensors(tmp_path / name) for name in runs)
    assert plain.keys() == overlap.keys() and all(np.array_equal(plain[k], overlap[k]) for k in plain)
