"""The stages that go on from a checkpoint, through the whole loop: losses, gradient norms and rates of several steps are the same under
every layout. (sft, reward and dpo on dense models: test_sft.py and test_preference_stages.py.)"""

import numpy as np
import pytest
from chats import colour_chats, write_jsonl
from training import EOD, MOE, SEQ, merged, on_ranks

LAYOUTS = [("dense", {"tp": 2, "sequence_parallel": True}), ("dense", {"pp": 2}), ("dense", {"cp": 2}), ("dense", {}), ("moe", {"ep": 2})]
MODELS = {"dense": {"family": "llama"}, "moe": {"family": "mixtral", "moe": MOE}}
STEPS = 4
STAGES = {
    "continued": {"data": {"replay": ["1", "old"], "replay_share": 0.3}, "schedule": {"kind": "cosine", "warmup_steps": 2},
                  "tune": {"l2_to_init": 0.1, "layer_lr_decay": 0.8}},
    "anneal": {"data": {"phases": [{"after_tokens": 2 * 4 * SEQ, "train": ["1", "old"]}]}, "average": {"kind": "ema", "decay": 0.5},
               "checkpoint": {"load_optimizer": True}},
    "long_context": {"model": {"rope_theta": 50000.0}, "train": {"seq_len": 2 * SEQ}, "schedule": {"kind": "constant"},
                     "long_context": {"needle_samples": 4, "needle_depths": 2, "short_tolerance": 10.0}},
    "sft": {"chat": {"template": "tags", "workers": 1}, "data": {"eod_id": -1, "reset_at_eod": False, "tokenizer": "bytes"},
            "train": {"seq_len": 128}, "schedule": {"kind": "constant"}},
}


@pytest.fixture(scope="module")
def bases(corpus, tmp_path_factory):
    """A trained model of each kind; (its configuration, its folder)."""
    found = {}
    for name, model in MODELS.items():
        folder = str(tmp_path_factory.mktemp(name) / "base")
        raw = {
            "run": {"dir": folder, "device": "cpu", "seed": 11},
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 257, **model},
            "data": {"train": [corpus["train"]], "valid": {"held_out": [corpus["valid"]]}, "eod_id": EOD, "reset_at_eod": True},
            # An epsilon that keeps the comparison about layouts where a gradient is rounding noise.
            "train": {"seq_len": SEQ, "global_batch": 4, "steps": 8, "precision": "fp32", "eval_samples": 4},
            "optim": {"lr": 3e-3, "eps": 1e-5}, "schedule": {"kind": "constant"}, "log": {"tensorboard": False},
        }
        on_ranks(1, raw)
        found[name] = raw, folder
    return found


@pytest.fixture(scope="module")
def one_rank():
    return {}


def configuration(stage, raw, base, corpus, folder):
    chats = write_jsonl(folder / "chats.jsonl", colour_chats())
    text = {"train": ["1", corpus["train"]], "valid": {"held_out": [corpus["valid"]]}}
    raw = merged(raw, {"stage": stage, "checkpoint": {"load": base, "load_optimizer": False}, "train": {"steps": STEPS}},
                 {"data": {"train": [chats], "valid": {"held_out": [chats]}} if stage == "sft" else text}, STAGES[stage])
    for lists in [raw["data"], *raw["data"].get("phases", [])]:
        for key in ("replay", "train"):
            lists.update({key: [corpus["valid"] if word == "old" else word for word in lists[key]]} if key in lists else {})
    return raw


@pytest.mark.parametrize("model, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_the_same_in_every_layout(bases, corpus, one_rank, tmp_path, stage, model, layout):
    raw, base = bases[model]
    raw = configuration(stage, raw, base, corpus, tmp_path)
    if (stage, model) not in one_rank:
        one_rank[stage, model] = on_ranks(1, merged(raw, {"run": {"dir": str(tmp_path / "one")}}))
    one = one_rank[stage, model]
    two = on_ranks(2, merged(raw, {"parallel": layout, "run": {"dir": str(tmp_path / "two")}}))
    assert len(one) == STEPS and one[0]["loss"] != one[1]["loss"]
    for key in ("loss", "grad_norm", "lr"):
        assert np.allclose([line[key] for line in two], [line[key] for line in one], rtol=1e-5, atol=1e-9), key
