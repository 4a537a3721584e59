"""launch/score.py: every conversation of a file gets its reward, or its log-probability, the same in every layout."""

import json
import sys

import numpy as np
import pytest
import ranks
from training import merged, on_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model and a language model that have seen a few pairs; (folders, the file of conversations, its pairs)."""
    folder = tmp_path_factory.mktemp("score")
    words = [("red", "blue"), ("one", "three"), ("up", "down"), ("a", "the"), ("yes", "no")] * 2
    pairs = [{"prompt": f"Question {i}?", "chosen": good, "rejected": bad + " indeed" * (i % 3)} for i, (good, bad) in enumerate(words)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    chats = [[{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p[which]}] for p in pairs for which in ("chosen", "rejected")]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat, "id": i}) + "\n\n" for i, chat in enumerate(chats)))
    raw = {
        "run": {"dir": str(folder / "reward"), "device": "cpu", "seed": 3}, "stage": "reward",
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 257,
                  "vocab_pad_multiple": 2},
        "data": {"train": [str(folder / "pairs.jsonl")], "valid": {"seen": [str(folder / "pairs.jsonl")]}, "tokenizer": "bytes"},
        "chat": {"template": "tags", "workers": 1},
        "train": {"seq_len": 64, "global_batch": 5, "steps": 12, "precision": "fp32", "eval_samples": 10},
        "optim": {"lr": 3e-3}, "schedule": {"kind": "constant"}, "log": {"tensorboard": False},
    }
    on_ranks(1, raw)
    on_ranks(1, merged(raw, {"stage": "dpo", "run": {"dir": str(folder / "policy")}}))
    return folder


def command(*argv):
    """On a rank: launch/score.py. Its exit code."""
    import runpy

    sys.argv = ["score.py", *argv]
    try:
        runpy.run_path("launch/score.py", run_name="__main__")
    except SystemExit as stop:
        return stop.code


def scored(num_ranks, model, source, target, *overrides):
    codes = ranks.run(num_ranks, command, str(model), "--input", str(source), "--output", str(target), "run.device=cpu", *overrides)
    assert codes == [0] * num_ranks and not list(target.parent.glob(f"{target.name}.*"))
    return [json.loads(line) for line in open(target)]


def test_rewards_are_those_that_validation_saw(trained, tmp_path):
    from engine.log import read_metrics

    found = scored(1, trained / "reward", trained / "chats.jsonl", tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == list(range(20))
    rewards = np.array([line["reward"] for line in found]).reshape(-1, 2)
    (seen,) = read_metrics(trained / "reward", "seen")
    assert seen["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert seen["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4) and abs(seen["margin"]) > 1e-3


def test_log_probabilities_are_those_that_validation_saw(trained, tmp_path):
    from engine.log import read_metrics

    found = scored(1, trained / "policy", trained / "chats.jsonl", tmp_path / "out.jsonl")
    logps = np.array([line["logp"] for line in found]).reshape(-1, 2)
    (seen,) = read_metrics(trained / "policy", "seen")
    assert logps.mean(0) == pytest.approx([seen["logps/chosen"], seen["logps/rejected"]], rel=1e-5)
    assert [line["logp_tokens"] for line in found] == [len(line["messages"][1]["content"]) + 1 for line in found]


@pytest.mark.parametrize("overrides", [["parallel.tp=2", "parallel.sequence_parallel=true"], ["parallel.pp=2"], ["train.micro_batch=4"]], ids=str)
def test_layouts_agree(trained, tmp_path, overrides):
    for model, key in (("reward", "reward"), ("policy", "logp")):
        one = scored(1, trained / model, trained / "chats.jsonl", tmp_path / f"{key}1.jsonl")
        two = scored(2, trained / model, trained / "chats.jsonl", tmp_path / f"{key}2.jsonl", *overrides)
        assert np.allclose([line[key] for line in two], [line[key] for line in one], rtol=1e-4, atol=1e-6)


def test_an_output_that_exists_is_kept(trained, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    codes = ranks.run(1, command, str(trained / "reward"), "--input", str(trained / "chats.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert codes == [2] and (tmp_path / "out.jsonl").read_text() == "precious"
