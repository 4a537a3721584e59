"""Supervised fine-tuning through the loop: it learns the answers, alike under every layout, and a tokenizer may grow on the way.

Left out: which tokens are trained (tests/data/test_chat.py) and that packing changes nothing (tests/data/test_pack.py).
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from chats import colour_chats, write_jsonl, write_tokenizer
from training import merged, on_ranks

from engine.data.indexed import DataError


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return {name: write_jsonl(folder / f"{name}.jsonl", colour_chats(num, seed)) for name, num, seed in (("train", 24, 0), ("held_out", 8, 1))}


@pytest.fixture
def raw_sft(chats, tmp_path):
    """A small dense model that answers in bytes."""
    return {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "seed": 11},
        "stage": "sft",
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
                  "vocab_size": 100},
        "data": {"train": [chats["train"]], "valid": {"held_out": [chats["held_out"]]}, "tokenizer": "bytes"},
        "chat": {"template": "tags", "workers": 1},
        "train": {"seq_len": 128, "global_batch": 4, "steps": 60, "precision": "fp32", "eval_samples": 4},
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "constant"},
        "log": {"tensorboard": False, "every": 20},
    }


def losses(lines) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_it_learns_to_answer(raw_sft):
    """From a uniform guess over the vocabulary, which the tokenizer widened from 100 to 257, to the two words asked for."""
    found = losses(on_ranks(1, raw_sft))
    assert found[0] == pytest.approx(math.log(257), rel=0.02) and np.mean(found[-5:]) < 0.6, found
    log = Path(raw_sft["run"]["dir"], "logs", "rank_00000.log").read_text()
    assert "24 conversations in" in log and "% full" in log
    assert json.loads(Path(raw_sft["run"]["dir"], "status.json").read_text())["state"] == "done"


def test_the_loss_is_of_what_is_said():
    """-log p, summed over the tokens whose mask is 1 and counted by them."""
    import torch

    from engine.stages.sft import Sft

    batch = {"loss_mask": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])}
    loss = Sft().loss("policy", torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]]), batch)
    assert loss.sum.item() == 14 and Sft().count("policy", batch).item() == 3


_one_rank: dict[bool, list[float]] = {}


@pytest.mark.parametrize("pack, layout", [(True, {"tp": 2, "sequence_parallel": True}), (True, {"pp": 2}), (True, {"cp": 2}), (False, {}),
                                          (False, {"cp": 2})], ids=str)
def test_layouts_agree(raw_sft, pack, layout):
    raw = merged(raw_sft, {"train": {"steps": 4, "eval_samples": 0}, "chat": {"pack": pack}, "optim": {"eps": 1e-5}})
    if pack not in _one_rank:
        _one_rank[pack] = losses(on_ranks(1, raw))
    one = _one_rank[pack]
    two = losses(on_ranks(2, merged(raw, {"parallel": layout, "run": {"dir": raw["run"]["dir"] + "2"}})))
    assert len(one) == 4 and one[3] < one[0] and np.allclose(two, one, rtol=1e-5, atol=0)


def test_a_grown_tokenizer_is_the_runs_own(raw_sft, tmp_path):
    spec = write_tokenizer(tmp_path / "plain", specials=("</s>", "<s>"))
    raw = merged(raw_sft, {"data": {"tokenizer": spec}, "chat": {"template": "chatml", "add_tokens": ["<|im_start|>", "<|im_end|>"]},
                           "train": {"steps": 2, "eval_samples": 0}})
    assert len(losses(on_ranks(2, raw))) == 2
    config = Path(raw["run"]["dir"], "config.yaml").read_text()
    from data_tools.tokenizer import load_tokenizer

    grown = f"hf:{raw['run']['dir']}/tokenizer"
    assert f"tokenizer: {grown}" in config and f"vocab_size: {load_tokenizer(spec).vocab_size + 2}" in config
    assert load_tokenizer(grown).encode("<|im_end|>") == [load_tokenizer(spec).vocab_size + 1]


def test_every_rank_hears_what_is_wrong_with_the_data(raw_sft, tmp_path):
    import ranks

    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(ranks.RankError) as caught:
        on_ranks(2, merged(raw_sft, {"data": {"train": [bad]}}))
    assert str(caught.value).count("bad.jsonl:1: no message of role assistant") == 2


def test_one_epoch_refuses_more(raw_sft):
    from engine.config import validate
    from engine.stages import build_stage

    raw = merged(raw_sft, {"data": {"one_epoch": True}})
    stage = build_stage("sft")
    run = stage.configure(validate(raw))
    train, valid = stage.datasets(run, 4, 4)
    assert len(train) == 4 and list(valid) == ["held_out"] and not run.checkpoint.load_position
    with pytest.raises(DataError, match=r"data.train \(.*train.jsonl\) holds 14 samples in one epoch, but 240 are asked for; lower train.steps"):
        stage.datasets(run, 240, 0)


def test_weighted_files(raw_sft, chats):
    """Three rows of the first file for each of the second: the sources are packed apart."""
    from engine.config import validate
    from engine.stages import build_stage

    stage = build_stage("sft")
    run = stage.configure(validate(merged(raw_sft, {"data": {"train": ["3", chats["held_out"], "1", chats["train"]]}})))
    train, _ = stage.datasets(run, 40, 0)
    assert [sum(source == k for source, _ in train.order.where(np.arange(40))) for k in (0, 1)] == [30, 10]
    assert len(train.batch(np.arange(8))["tokens"]) == 8


@pytest.mark.parametrize("packed", [True, False])
def test_exact_matches_counts_conversations_whose_every_label_is_hit(packed):
    import torch

    from engine.stages.sft import exact_matches

    mask = torch.tensor([[0, 1, 1, 0, 1, 0.], [0, 0, 1, 1, 0, 0.]])
    batch = {"tokens": torch.zeros(2, 6, dtype=torch.long), "loss_mask": mask}
    if packed:  # row 0: conversations 0 0 0 | 1 1 and padding 2; row 1: one conversation and padding
        batch["segment_ids"] = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    everything = torch.ones(2, 6, dtype=torch.bool)
    assert exact_matches(everything, batch) == ((3, 3) if packed else (2, 2))
    missed = everything.clone()
    missed[0, 2] = missed[0, 3] = missed[1, 0] = False  # one trained label and two that nobody asks for
    assert exact_matches(missed, batch) == ((2, 3) if packed else (1, 2))


def test_exact_match_is_validated_and_rises(raw_sft):
    from engine.log import read_metrics

    on_ranks(1, merged(raw_sft, {"chat": {"exact_match": True}, "train": {"eval_samples": 8, "eval_at_start": True, "steps": 100},
                                 "schedule": {"kind": "cosine"}, "data": {"valid": {"seen": raw_sft["data"]["train"]}}}))
    before, *_, after = read_metrics(raw_sft["run"]["dir"], "seen")
    assert before["step"] == 0 and before["exact_match"] == 0.0 and after["exact_match"] > 0.9
