"""Stopping and resuming: bit-equal in the same layout, within 1e-5 in another, nothing read twice or lost.

Left out: every pair of layouts (tests/test_layout_matrix.py), ledgers of mixtures (tests/test_mixture_run.py), averages (tests/test_average.py).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranks
from chats import colour_chats, write_jsonl
from training import MOE, merged, on_ranks

DROPOUT = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}
# The batch grows in steps 1 to 4 (4, 4, 6, 6, then 8), and the mixture changes from the 7th sample to the 20th: a stop after step 3 is amid both.
GROWING = {"train": {"global_batch": 8, "rampup": {"start": 4, "increment": 2, "samples": 16}}, "data": {"train": ["1", "TRAIN", "1", "VALID"],
           "phases": [{"after_tokens": 7 * 32, "ramp_tokens": 13 * 32, "train": ["1", "TRAIN", "5", "VALID"]}]}}
LAYOUTS = {
    "one rank": (1, {}),
    "dropout": (1, DROPOUT),
    "tp2 sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "tp2 dropout": (2, {"parallel": {"tp": 2, "sequence_parallel": True}, **DROPOUT}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "cp2 zero1 dropout": (2, {"parallel": {"cp": 2, "zero1": True}, **DROPOUT}),
    "zero1": (2, {"parallel": {"zero1": True}}),
    "zero1 overlap": (2, {"parallel": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "bf16 zero1": (2, {"parallel": {"zero1": True}, "train": {"precision": "bf16"}}),
    "bf16": (1, {"train": {"precision": "bf16"}}),
    "fp16": (1, {"train": {"precision": "fp16"}, "optim": {"initial_loss_scale": 1024.0}}),
    "moe ep2": (2, {"parallel": {"ep": 2}, "model": {"moe": MOE}}),
    "moe pp2 vpp2 dropout": (2, {"parallel": {"pp": 2, "vpp": 2}, "model": {"moe": MOE, "num_layers": 4, **DROPOUT["model"]}}),
    "moe bias zero1": (2, {"parallel": {"zero1": True}, "model": {"moe": {**MOE, "balance": "aux_free", "score": "sigmoid"}}}),
}


def losses(lines):
    return [(line["step"], line["loss"], line["grad_norm"], line["consumed_samples"], line.get("sources")) for line in lines]


def named(change, corpus):
    """The change with the corpora in the place of their names."""
    if isinstance(change, dict):
        return {key: named(value, corpus) for key, value in change.items()}
    return [named(item, corpus) for item in change] if isinstance(change, list) else {"TRAIN": corpus["train"], "VALID": corpus["valid"]}.get(change, change)


def differing(one, other):
    """Names of the tensors (weights, masters, moments) that are not bit for bit the same in two checkpoints."""
    import torch

    from engine.mcore import stream
    from engine.mcore.checkpoint import find

    pair = [(find(folder), stream.read_metadata(find(folder))) for folder in (one, other)]
    sizes = [{key: tuple(entry.size) for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")} for _, metadata in pair]
    assert sizes[0] == sizes[1] and any(key.startswith("optimizer.state.exp_avg_sq.") for key in sizes[0])
    return [key for key, size in sizes[0].items() if not torch.equal(*(stream.read(*place, key, (0,) * len(size), size) for place in pair))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_layout_resumes_bit_equal(raw_run, tmp_path, name):
    num_ranks, change = LAYOUTS[name]
    unbroken = merged(raw_run, change, {"run": {"dir": str(tmp_path / "unbroken")}})
    broken = merged(raw_run, change, {"run": {"dir": str(tmp_path / "broken")}})
    expected = losses(on_ranks(num_ranks, unbroken))
    on_ranks(num_ranks, merged(broken, {"train": {"steps": 3}, "schedule": {"decay_steps": 6}}))
    assert losses(on_ranks(num_ranks, broken)) == expected
    assert len(expected) == 6
    assert not differing(tmp_path / "unbroken", tmp_path / "broken")


def test_a_stop_amid_a_growing_batch_and_a_changing_mixture(raw_run, corpus, tmp_path):
    """The order of a mixture depends on how many steps are planned, so here the run is not told to stop: what came after step 3 is taken away."""
    raw = merged(raw_run, named(GROWING, corpus), DROPOUT, {"run": {"dir": str(tmp_path / "unbroken")}, "checkpoint": {"save_every": 3}})
    expected = losses(on_ranks(2, raw))
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "iter_0000006")
    assert losses(on_ranks(2, merged(raw, {"run": {"dir": str(tmp_path / "broken")}}))) == expected
    assert [consumed for *_, consumed, _ in expected] == [4, 8, 14, 20, 28, 36] and expected[2][-1] != expected[3][-1]
    assert not differing(tmp_path / "unbroken", tmp_path / "broken")


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


def test_a_checkpoint_without_moments_is_refused_on_every_rank(raw_run, tmp_path):
    """One parameter's are missing, which one of two pp ranks trains."""
    import pickle

    on_ranks(1, merged(raw_run, {"train": {"steps": 1}, "schedule": {"kind": "constant"}}))
    file, = Path(raw_run["run"]["dir"], "checkpoints").glob("iter_*/.metadata")
    metadata = pickle.loads(file.read_bytes())
    for key in [key for key in metadata.state_dict_metadata if key.startswith("optimizer.") and "final_layernorm" in key]:
        del metadata.state_dict_metadata[key]
    file.write_bytes(pickle.dumps(metadata))
    new = merged(raw_run, {"run": {"dir": str(tmp_path / "new")}, "checkpoint": {"load": str(file.parent), "verify": False}, "parallel": {"pp": 2}})
    with pytest.raises(ranks.RankError) as caught:
        on_ranks(2, new)
    assert str(caught.value).count("CheckpointError: ") == 2
    assert "holds no optimizer state of decoder.final_layernorm.weight, which this run trains" in str(caught.value)


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


# --- another number of replicas --------------------------------------------------------------------------------------------


def what_is_read(raw, parts):
    """On one rank, which plays every replica: the global batches, as (first sample, {name: numbers [rows, s]}), that a run reads which
    is started for each of `parts` (replicas, steps) in turn."""
    import numpy as np

    from engine.batches import Feed
    from engine.config import validate
    from engine.data.loader import Loader
    from engine.mcore.checkpoint import Position
    from engine.stages import build_stage

    position, found = Position(), []
    for dp, steps in parts:
        stage = build_stage(raw.get("stage", "pretrain"))
        run = stage.configure(validate(raw, dp))
        dataset, _ = stage.datasets(run, 64, 0)
        feeds = [Feed(run, Loader(dataset, run.train.micro_batch, rank, dp), position, freely=True) for rank in range(dp)]
        for _ in range(steps):
            replicas, before = [next(feed) for feed in feeds], position
            for feed in feeds:
                feed.step = before.step + 1
                position = feed.position(before)
            order = [batch for number in range(len(replicas[0])) for batch in (replica[number] for replica in replicas)]
            found.append((before.consumed_samples, {name: np.concatenate([batch[name].numpy() for batch in order]) for name in order[0]}))
        for feed in feeds:
            feed.__exit__(None, None, None)
    return found


@pytest.mark.parametrize("kind", ["text", "packed conversations"])
def test_another_number_of_replicas_reads_the_same_samples_in_the_same_order(raw_run, corpus, tmp_path, kind):
    """One replica's ten steps, while the batch grows and the mixture changes, against 4, 2 and 1 replicas that go on from each other."""
    raw = merged(raw_run, named(GROWING, corpus), {"train": {"steps": 10, "rampup": {"increment": 4}}})
    if kind != "text":
        chats = write_jsonl(tmp_path / "chats.jsonl", colour_chats())
        raw = merged(raw, {"stage": "sft", "data": {"train": [chats], "valid": {}, "phases": [], "tokenizer": "bytes", "eod_id": -1, "reset_at_eod": False},
                           "chat": {"template": "tags", "workers": 1}, "train": {"seq_len": 128}, "model": {"vocab_size": 257}})
    whole, = ranks.run(1, what_is_read, raw, [(1, 10)])
    parts, = ranks.run(1, what_is_read, raw, [(4, 2), (2, 3), (1, 2), (4, 3)])
    assert [first for first, _ in whole] == [first for first, _ in parts] == [0, 4, 8, 12, 16, *range(24, 57, 8)][:10]
    for (first, one), (_, other) in zip(whole, parts):
        assert one.keys() == other.keys() >= {"tokens", "labels", "loss_mask"}
        assert all(np.array_equal(one[name], other[name]) for name in one), f"the batch that begins with sample {first}"
    rows = [row.tobytes() for _, batch in whole for row in batch["tokens"]]
    assert len(rows) == whole[-1][0] + 8 and len(set(rows)) > 12
