"""A task whose best reward is known, learnt through the whole loop on one rank, and not learnt with any sign turned round.

The prompt says whether the answer must begin with an ASCII character or with another byte. A policy that does not read it is right half of
the time, as is one that has learnt nothing; one that reads it is always right. Where only a divergence, an entropy or a critic is to be
seen, the reward has weight 0 or its course is known.
"""

import importlib
import os
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import ranks
from chats import write_jsonl
from training import merged, train

RIGHT = """
def right(prompts, answers, records):
    return [float(bool(answer) and (answer[0] > "\\x7f") == record["wants_byte"]) for answer, record in zip(answers, records)]
"""
ALGORITHMS = {
    **{loss: {"stage": "grpo", "grpo": {"loss": loss}} for loss in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce", "rloo")},
    "ppo": {"stage": "ppo", "ppo": {"kl_coef": 0.01, "whiten_advantages": False}},  # whitened they never end to shake what is learnt
    "online_dpo": {"stage": "online_dpo", "dpo": {"beta": 0.3}},
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bandit")
    (folder / "bandit.py").write_text(RIGHT)
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "ab"[i % 2] * 30, "wants_byte": i % 2} for i in range(32)])
    return {
        "run": {"device": "cpu", "seed": 3, "dir": str(folder / "run")},
        "model": {"family": "llama", "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "vocab_size": 257,
                  "init_std": 0.05},
        "data": {"train": [prompts], "tokenizer": "bytes", "cache_dir": str(folder / "cache")},
        "chat": {"template": "tags", "workers": 1},
        "rollout": {"samples_per_prompt": 16, "max_new_tokens": 2, "log_samples": 0},
        "rewards": [{"kind": "python", "path": "bandit:right"}],
        "train": {"seq_len": 64, "micro_batch": 8, "global_batch": 8, "steps": 12, "precision": "fp32"},
        "optim": {"lr": 2e-2, "weight_decay": 0.0}, "schedule": {"kind": "constant"}, "checkpoint": {"save_at_end": False},
        "log": {"tensorboard": False, "every": 1000},
    }


# --- turning signs round, on the rank -----------------------------------------------------------------------------------


def negated(function):
    return lambda *args, **kwargs: -function(*args, **kwargs)


def with_one_negated(number):
    """Of a function that returns two."""
    def turn(function):
        return lambda *args, **kwargs: tuple(-x if k == number else x for k, x in enumerate(function(*args, **kwargs)))
    return turn


def upside_down(function):
    return lambda *args, **kwargs: 1 / function(*args, **kwargs)


def with_entropy_negated(policy_loss):
    """Of a policy's output [b, s, 2] the second number is the entropy."""
    return lambda options, rollout, objective, output, *rest: policy_loss(options, rollout, objective, output * output.new_tensor([1, -1]), *rest)


SABOTAGE = {  # what is turned round: where it is looked up, and how
    "advantage": ("engine.rl.advantages", negated),
    "generalised advantage": ("engine.rl.gae", with_one_negated(0)),
    "ratio": ("engine.rl.ratio", upside_down),
    "policy loss": ("engine.rl.policy_loss", negated),
    "divergence": ("engine.rl.kl_estimate", negated),
    "entropy in grpo": ("engine.stages.grpo.policy_loss", with_entropy_negated),
    "entropy in ppo": ("engine.stages.ppo.policy_loss", with_entropy_negated),
    "value target": ("engine.rl.gae", with_one_negated(1)),
    "value loss": ("engine.rl.value_loss", negated),
    "preference": ("engine.stages.dpo.difference", negated),
}


def trained(raw, sabotage=""):
    """On a rank: the lines of metrics.jsonl. The reward's function is found beside the prompts."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, PYTHONPATH=os.path.dirname(raw["data"]["train"][0])))
        if sabotage:
            place, turn = SABOTAGE[sabotage]
            module, _, name = place.rpartition(".")
            module = importlib.import_module(module)
            stack.enter_context(patch.object(module, name, turn(getattr(module, name))))
        return train(raw, 1)


def curve(key, raw, folder, *changes, sabotage=""):
    """How a number went, float64 [steps]."""
    lines, = ranks.run(1, trained, merged(raw, {"run": {"dir": str(folder)}}, *changes), sabotage)
    return np.array([line[key] for line in lines], dtype=float)


# --- the optimum is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_best_answers_are_learnt(raw, tmp_path, name):
    reward = curve("reward", raw, tmp_path, ALGORITHMS[name], {"train": {"steps": {"online_dpo": 36, "ppo": 24}.get(name, 18)}})
    assert reward[0] < 0.65 and reward[-4:].mean() >= 0.95


@pytest.mark.parametrize("name, sabotage", [
    *((loss, sabotage) for loss in ("grpo", "reinforce", "rloo") for sabotage in ("advantage", "policy loss")),
    ("grpo", "ratio"), ("ppo", "generalised advantage"), ("ppo", "ratio"), ("ppo", "policy loss"), ("online_dpo", "preference"),
])
def test_with_a_sign_turned_round_the_worst_answers_are_learnt(raw, tmp_path, name, sabotage):
    reward = curve("reward", raw, tmp_path, ALGORITHMS[name], {"train": {"steps": 24}} if name == "online_dpo" else {}, sabotage=sabotage)
    assert reward[-2:].mean() < reward[0] - 0.1


# --- what holds the policy back ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(raw, tmp_path_factory):
    """To go on from a policy that knows the task, with rewards that count nothing, and beside it the folder of what it was at first."""
    folder = tmp_path_factory.mktemp("learnt")
    for name, steps, lr in (("knows", 12, 2e-2), ("new", 1, 1e-9)):
        curve("reward", raw, folder / name, ALGORITHMS["grpo"], {"train": {"steps": steps}, "optim": {"lr": lr}, "checkpoint": {"save_at_end": True}})
    return {"checkpoint": {"load": str(folder / "knows")}, "rewards": [{**raw["rewards"][0], "weight": 0.0}]}, str(folder / "new")


@pytest.mark.parametrize("is_sabotaged", [False, True])
@pytest.mark.parametrize("stage, key", [("grpo", "kl/reference"), ("ppo", "kl/answer")])
def test_the_divergence_shrinks_and_grows_with_its_sign_turned_round(raw, learnt, tmp_path, stage, key, is_sabotaged):
    knowing, new = learnt
    changes = {"stage": stage, stage: {"kl_coef": 1.0}, "checkpoint": {"roles": {"reference": new}}}
    kl = abs(curve(key, raw, tmp_path, knowing, changes, sabotage="divergence" if is_sabotaged else ""))  # reported by what is turned round
    assert kl[0] > 0.1
    assert kl[-1] > 1.5 * kl[0] if is_sabotaged else kl[-1] < 0.5 * kl[0]


@pytest.mark.parametrize("is_sabotaged", [False, True])
@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_the_entropy_rises_and_falls_with_its_sign_turned_round(raw, learnt, tmp_path, stage, is_sabotaged):
    changes = {"stage": stage, stage: {"entropy_coef": 1.0, "kl_coef": 0.0}}
    entropy = abs(curve("entropy", raw, tmp_path, learnt[0], changes, sabotage=f"entropy in {stage}" if is_sabotaged else ""))
    assert entropy[0] < np.log(257) - 0.1
    assert entropy[-1] < entropy[0] - 0.5 if is_sabotaged else entropy[-1] > entropy[0] + 0.1


# --- the critic -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sabotage", ["", "value target", "value loss"])
def test_the_critic_foresees_the_reward_and_errs_with_a_sign_turned_round(raw, tmp_path, sabotage):
    """The policy keeps still, so that the reward stays near a half, of which the critic knows nothing at first."""
    changes = {"stage": "ppo", "ppo": {"kl_coef": 0.0, "critic_warmup": 11}}
    value = curve("critic/value", raw, tmp_path, changes, sabotage=sabotage)
    error = abs(value - 0.5)
    assert error[0] > 0.4
    assert error[-1] > error[0] + 0.2 if sabotage else error[-1] < 0.2


def test_the_critic_has_a_rate_of_its_own(raw, tmp_path):
    changes = {"stage": "ppo", "ppo": {"kl_coef": 0.0, "critic_warmup": 11, "critic_lr": 1e-9}}
    assert abs(curve("critic/value", raw, tmp_path, changes) - 0.5).min() > 0.4
