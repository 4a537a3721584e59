"""ppo, grpo and online_dpo through the whole loop: every layout draws the same answers and learns the same from them, a resumed run is an
unbroken one, and each option does what its sentence says."""

import json
from pathlib import Path

import numpy as np
import pytest
from chats import write_jsonl
from training import MOE, merged, on_ranks

LAYOUTS = [(2, "dense", {"tp": 2, "sequence_parallel": True}), (2, "dense", {"pp": 2}), (2, "dense", {"zero1": True}), (2, "moe", {"ep": 2})]
MODELS = {"dense": {"family": "llama"}, "moe": {"family": "mixtral", "moe": MOE}}
STEPS = 3
SECTIONS = {
    "grpo": {"grpo": {"kl_coef": 0.05, "entropy_coef": 0.01}},
    "ppo": {"ppo": {"entropy_coef": 0.01, "kl_control": "adaptive", "kl_horizon": 10.0, "critic_lr": 5e-3}},
    "online_dpo": {"dpo": {"nll_weight": 0.1}},
}
NUMBERS = {
    "grpo": ("loss", "grad_norm", "reward", "kl/reference", "entropy", "ratio_error", "answer_tokens"),
    "ppo": ("loss", "grad_norm", "reward", "kl/answer", "kl_coef", "critic/loss", "critic/grad_norm", "critic/return", "entropy"),
    "online_dpo": ("loss", "grad_norm", "reward", "pairs", "rewards/margin", "reward/margin"),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A configuration without a stage: prompts of several lengths, rewarded for digits."""
    folder = tmp_path_factory.mktemp("online")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{'say ' * (i % 3)}{i}"} for i in range(40)])
    return {
        "run": {"device": "cpu", "seed": 5},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
                  "vocab_size": 257},
        "data": {"train": [prompts], "valid": {"held_out": [prompts]}, "tokenizer": "bytes", "cache_dir": str(folder / "cache")},
        "chat": {"template": "tags", "workers": 1},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 6, "minibatches": 2, "temperature": 1.5},
        "rewards": [{"kind": "regex", "pattern": "[0-9a-zA-Z]"}],
        # An epsilon that keeps the comparison about layouts where a gradient is rounding noise.
        "train": {"seq_len": 48, "micro_batch": 1, "global_batch": 4, "steps": STEPS, "precision": "fp32"},
        "optim": {"lr": 3e-3, "eps": 1e-5}, "schedule": {"kind": "constant"}, "log": {"tensorboard": False},
    }


def configuration(raw, stage, folder, *changes):
    return merged(raw, {"stage": stage, "run": {"dir": str(folder)}}, SECTIONS[stage], *changes)


def said(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank():
    return {}


@pytest.mark.parametrize("num_ranks, model, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stage", SECTIONS)
def test_a_stage_is_the_same_in_every_layout(raw, one_rank, tmp_path, stage, num_ranks, model, layout):
    changes = {"model": MODELS[model]}
    if (stage, model) not in one_rank:
        one_rank[stage, model] = on_ranks(1, configuration(raw, stage, tmp_path / "one", changes)), said(tmp_path / "one")
    one, texts = one_rank[stage, model]
    two = on_ranks(num_ranks, configuration(raw, stage, tmp_path / "two", changes, {"parallel": layout}))
    assert len(one) == STEPS and one[0]["loss"] != one[1]["loss"]
    assert said(tmp_path / "two") == texts and len(texts) == 2 * STEPS
    for key in NUMBERS[stage]:
        assert np.allclose([line[key] for line in two], [line[key] for line in one], rtol=2e-5, atol=1e-7), key
    for line in one + two:
        assert line.get("first_ratio_error", 0.0) == 0.0
        assert abs(line.get("mismatch/k3", 0.0)) < 1e-9
    if stage != "online_dpo":
        assert "first_ratio_error" in one[0] and one[0]["ratio_error"] > 0


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, changes", [
    ("ppo", {}),
    ("grpo", {"rollout": {"one_step_off": True}}),
], ids=["ppo with its critic and coefficient", "grpo drawing ahead"])
def test_a_resumed_run_is_an_unbroken_one(raw, tmp_path, stage, changes):
    whole = configuration(raw, stage, tmp_path / "whole", {"train": {"steps": 4}, "checkpoint": {"save_every": 2}}, changes)
    unbroken = on_ranks(1, whole)
    broken = merged(whole, {"run": {"dir": str(tmp_path / "broken")}})
    on_ranks(1, merged(broken, {"train": {"steps": 2}, "schedule": {"decay_steps": 4}}))
    resumed = on_ranks(1, broken)
    assert len(unbroken) == len(resumed) == 4
    for one, other in zip(unbroken, resumed):
        for key in (*NUMBERS[stage], "consumed_samples", "staleness"):
            assert one[key] == other[key], (one["step"], key)
    if changes:
        assert [line["staleness"] for line in unbroken] == [0, 1, 0, 1]  # nothing is drawn ahead of the checkpoint after step 2
    assert [line["consumed_samples"] for line in unbroken] == [4, 8, 12, 16]


# --- options ----------------------------------------------------------------------------------------------------------


def test_validation_reports_rewards_of_the_most_probable_answers(raw, tmp_path):
    from engine.log import read_metrics

    on_ranks(1, configuration(raw, "grpo", tmp_path, {"train": {"steps": 0, "eval_samples": 40}}))
    one, = read_metrics(tmp_path, "held_out")
    assert one["reward"] == one["reward/regex"] and 0 <= one["reward"] <= 1 and 0 < one["answer_tokens"] <= 6 and "valid_loss" not in one
    two = tmp_path / "two"
    on_ranks(2, configuration(raw, "grpo", two, {"train": {"steps": 0, "eval_samples": 40}}))
    assert read_metrics(two, "held_out")[0] == one


def test_dynamic_sampling_learns_from_full_batches_of_unequal_groups(raw, tmp_path):
    from engine.log import read_metrics

    # Few answers hold a digit, so that many groups are all zeros.
    changes = {"rewards": [{"kind": "regex", "pattern": "[0-4]"}], "rollout": {"log_samples": 100}, "grpo": {"dynamic_sampling": True}}
    lines = on_ranks(2, configuration(raw, "grpo", tmp_path, changes))
    texts = said(tmp_path)
    for line in lines:
        rewards = [one["reward"] for one in texts if one["step"] == line["step"]]
        groups = np.array(rewards).reshape(-1, 4)
        assert len(groups) == 4 * line["groups_kept"] and (groups.min(1) < groups.max(1)).all()
    assert max(line["rounds"] for line in lines) > 1 and any(line["groups_kept"] == 1 for line in lines)
    consumed = np.diff([0, *(line["consumed_samples"] for line in lines)])
    assert consumed.tolist() == [4 * line["rounds"] for line in lines]
    numbers = [{one["sample"] for one in texts if one["step"] == line["step"]} for line in lines]
    assert not set.intersection(*numbers[:2])
    assert read_metrics(tmp_path)[-1]["consumed_samples"] == 4 * sum(line["rounds"] for line in lines)


def test_dynamic_sampling_stops_after_max_rounds_and_learns_nothing_from_equal_groups(raw, tmp_path):
    changes = {"rewards": [{"kind": "regex", "pattern": "nowhere"}], "grpo": {"dynamic_sampling": True, "max_rounds": 2}}
    lines = on_ranks(1, configuration(raw, "grpo", tmp_path, changes))
    assert all(line["rounds"] == 2 and line["groups_kept"] == 0 and line["skipped"] and line["loss"] is None for line in lines)


def test_the_critic_warms_up_alone(raw, tmp_path):
    lines = on_ranks(1, configuration(raw, "ppo", tmp_path, {"ppo": {"critic_warmup": 2}}))
    assert [line["skipped"] for line in lines] == [True, True, False]
    assert lines[1]["critic/loss"] != lines[0]["critic/loss"] and lines[1]["kl/answer"] == 0 and lines[2]["kl/reference"] > 0


def test_updates_end_early_when_the_policy_has_moved(raw, tmp_path):
    rollout = {"rollout": {"epochs": 4}}
    every = on_ranks(1, configuration(raw, "ppo", tmp_path / "every", rollout))
    early = on_ranks(1, configuration(raw, "ppo", tmp_path / "early", rollout, {"ppo": {"early_stop_kl": 1e-6}}))
    assert [line["updates"] for line in every] == [8] * STEPS
    assert all(2 <= line["updates"] < 8 for line in early)


def test_penalties_and_clips_change_the_reward(raw, tmp_path):
    plain = {"rewards": [{"kind": "regex", "pattern": ".", "weight": 5.0}], "rollout": {"reward_clip": 2.0, "log_samples": 16}}
    on_ranks(1, configuration(raw, "grpo", tmp_path / "a", plain))
    assert {one["reward"] for one in said(tmp_path / "a")} <= {2.0, 0.0}
    changes = {"rollout": {"missing_eos_penalty": 0.5}, "grpo": {"overlong_buffer": 4, "overlong_penalty": 1.0}}
    on_ranks(1, configuration(raw, "grpo", tmp_path / "b", plain, changes))
    first = [one for one in said(tmp_path / "b") if one["step"] == 1]
    for one in first:
        expected = min(5.0 * one["regex"], 2.0) - 0.5 * (not one["ended"]) - max(0, one["tokens"] - 2) / 4
        assert one["reward"] == pytest.approx(expected, abs=1e-6)


# --- a reward model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(raw, tmp_path_factory):
    """A reward model of other sizes than the policy."""
    folder = tmp_path_factory.mktemp("judge")
    pairs = write_jsonl(folder / "pairs.jsonl", [{"prompt": str(i), "chosen": f"{i}{i}", "rejected": "no"} for i in range(8)])
    on_ranks(1, {**{key: raw[key] for key in ("chat", "optim", "schedule", "log")}, "stage": "reward", "run": {"dir": str(folder / "run"), "device": "cpu"},
                 "model": {**raw["model"], "num_layers": 4, "hidden_size": 16}, "data": {"train": [pairs], "tokenizer": "bytes"},
                 "train": {"seq_len": 48, "global_batch": 4, "micro_batch": 2, "steps": 1, "precision": "fp32"}})
    return str(folder / "run")


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}, {}], ids=str)
def test_a_reward_model_judges_and_starts_the_critic(raw, judge, one_rank, tmp_path, layout):
    changes = {"model": MODELS["dense"], "rewards": [{"kind": "model"}, {"kind": "regex", "pattern": "[0-9]", "weight": 0.1}],
               "checkpoint": {"roles": {"reward": judge}}}
    if "judged" not in one_rank:
        one_rank["judged"] = on_ranks(1, configuration(raw, "ppo", tmp_path / "one", changes)), said(tmp_path / "one")
    one, texts = one_rank["judged"]
    two = on_ranks(2, configuration(raw, "ppo", tmp_path / "two", changes, {"parallel": layout}))
    for key in (*NUMBERS["ppo"], "reward/model", "reward/regex"):
        assert np.allclose([line[key] for line in two], [line[key] for line in one], rtol=2e-5, atol=1e-7), key
    assert [text["answer"] for text in said(tmp_path / "two")] == [text["answer"] for text in texts]
    for text in texts:
        assert text["reward"] == pytest.approx(text["model"] + 0.1 * text["regex"], abs=1e-6)
    assert len({text["model"] for text in texts}) > 1
