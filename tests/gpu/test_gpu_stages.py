"""Every stage, part of a model and way of feeding on a GPU, each beside the same run on a CPU where that draws the same numbers.

    python -m pytest tests/gpu -m gpu -rs

The torch layers in fp32, from weights that a CPU rank wrote; what is special to Transformer Engine is in test_gpu.py. Left out: speed.
"""

import importlib.util

import gpu
import numpy as np
import parity_table
import pytest
from chats import colour_chats, write_jsonl
from training import merged

GPUS = gpu.num_gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="there is no GPU")]
needs_two = pytest.mark.skipif(0 < GPUS < 2, reason="needs two GPUs")
needs_te = pytest.mark.skipif(bool(GPUS) and not gpu.has_te(), reason="needs Transformer Engine")
BACKENDS = ["torch", pytest.param("te", marks=needs_te)]
MODELS = ("post", "moe-bias", "moe-both", "gemma", "moe-sinks", "latent-moe-mtp", "tied-mtp")


def at(tmp_path, name):
    return {"run": {"dir": str(tmp_path / name)}}


def numbers(lines, *names):
    return np.array([[line[name] for name in names] for line in lines])


@pytest.fixture
def plain(raw_run):
    """raw_run on the torch layers in fp32."""
    return merged(raw_run, {"train": {"backend": "torch"}})


def beside_a_cpu(raw, tmp_path, *changes, later=(), on_gpu=(), rtol=2e-3):
    """Losses of both, from the weights that a CPU rank wrote after a step: initial draws differ between devices. later: changes from then on."""
    gpu.train(raw, *changes, at(tmp_path, "start"), {"train": {"steps": 1}, "schedule": {"decay_steps": 6}}, device="cpu")
    start = {"checkpoint": {"load": str(tmp_path / "start"), "load_optimizer": False}}
    theirs, ours = (gpu.train(raw, *changes, start, *later, at(tmp_path, device), *more, device=device) for device, more in (("cpu", ()), ("cuda", on_gpu)))
    np.testing.assert_allclose(numbers(ours, "loss"), numbers(theirs, "loss"), rtol=rtol)


# --- parts of models, and tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_models_equal_the_cpus(plain, tmp_path, model):
    beside_a_cpu({**plain, "model": {**parity_table.MODELS[model], "vocab_size": plain["model"]["vocab_size"]}}, tmp_path)


@needs_te
@pytest.mark.parametrize("change", [
    {"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position": 32}},
    {"logits_softcap": 5.0, "scale_embeddings": True},
    {"family": "mixtral", "moe": {"num_experts": 8, "top_k": 2, "num_groups": 4, "group_top_k": 2, "balance": "none"}},
    {"norm_zero_centered": True, "norm_place": "both", "sliding_window": 16, "sliding_window_freq": 2, "rope_local_theta": 100.0},
    {"attention_sinks": True, "activation": "clamped_swiglu", "swiglu_limit": 2.0, "sliding_window": 16, "sliding_window_freq": 2},
], ids=str)
def test_what_te_shares_with_the_torch_layers(plain, tmp_path, change):
    shape = {"model": {"hidden_size": 128, "ffn_hidden_size": 256, **change}, "train": {"seq_len": 64}}
    beside_a_cpu(plain, tmp_path, shape, on_gpu=[{"train": {"backend": "te", "precision": "bf16"}}], rtol=2e-2)


@pytest.mark.parametrize("lora", [{"rank": 4}, {"rank": 4, "dora": True}], ids=str)
def test_adapters_equal_the_cpus(plain, tmp_path, lora):
    beside_a_cpu(plain, tmp_path, {"lora": lora})


@pytest.mark.parametrize("change", [
    {"tune": {"freeze": ["embedding"]}}, {"tune": {"layer_lr_decay": 0.8}},
    {"average": {"kind": "ema", "every": 1}}, {"train": {"compile": True}}, {"run": {"deterministic": True}},
], ids=str)
def test_ways_of_tuning_equal_the_cpus(plain, tmp_path, change):
    beside_a_cpu(plain, tmp_path, later=[change])


# --- stages -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def aligned(tmp_path):
    """A small model that answers in bytes, without a stage and its data."""
    return {
        "run": {"dir": str(tmp_path / "run"), "seed": 11},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 257},
        "data": {"tokenizer": "bytes"},
        "chat": {"template": "tags", "workers": 1},
        "train": {"seq_len": 128, "global_batch": 4, "steps": 6, "precision": "fp32", "eval_samples": 4, "backend": "torch"},
        "optim": {"lr": 1e-3, "eps": 1e-5},
        "schedule": {"kind": "constant"},
        "log": {"tensorboard": False},
    }


@pytest.fixture
def talks(tmp_path):
    return {"data": {name: files(write_jsonl(tmp_path / f"{name}.jsonl", colour_chats(num, seed)))
                     for name, num, seed, files in (("train", 24, 0, lambda path: [path]), ("valid", 8, 1, lambda path: {"held_out": [path]}))}}


@pytest.fixture
def pairs(tmp_path):
    words = ["red", "blue", "green", "pink"]
    lines = [{"prompt": words[i % 4], "chosen": f"{words[i % 4]} {words[i % 4]}", "rejected": f"{words[(i + i // 4 + 1) % 4]} no"} for i in range(24)]
    return {"data": {"train": [write_jsonl(tmp_path / "pairs.jsonl", lines[:20])], "valid": {"held_out": [write_jsonl(tmp_path / "held.jsonl", lines[20:])]}}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_sft_equals_the_cpus(aligned, talks, tmp_path, backend):
    on_te = [{"train": {"backend": "te", "precision": "bf16"}}] if backend == "te" else []
    beside_a_cpu(aligned, tmp_path, talks, {"stage": "sft"}, on_gpu=on_te, rtol=2e-2 if on_te else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", [{"stage": "reward"}, {"stage": "dpo"}, {"stage": "dpo", "dpo": {"reference": "stored"}}], ids=str)
def test_preferences_equal_the_cpus(aligned, pairs, tmp_path, stage, backend):
    """Frozen roles, the scalar head, scores, and pairs whose prompt is computed once (te computes row by row)."""
    on_te = [{"train": {"backend": "te", "precision": "bf16"}}] if backend == "te" else []
    calm = {"optim": {"lr": 2e-4}} if stage["stage"] == "reward" else {}  # at 1e-3 its gradients grow, and bf16's rounding with them
    beside_a_cpu(aligned, tmp_path, pairs, stage, calm, on_gpu=on_te, rtol=3e-2 if on_te else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", ["grpo", "ppo", "online_dpo"])
def test_answers_are_drawn_and_learned_from(aligned, tmp_path, stage, backend):
    """Answers of a GPU's generator are its own, so what must hold by itself is looked at; frozen networks rest in host memory meanwhile."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{'say ' * (i % 3)}{i}"} for i in range(40)])
    # A pattern that half of the answers have, so that a group of equal rewards, whose gradient is 0, is rare; kl_coef gives grpo its reference.
    online = {"stage": stage, "data": {"train": [prompts]}, "rewards": [{"kind": "regex", "pattern": "[0-9a-j]"}], "grpo": {"kl_coef": 0.04},
              "rollout": {"samples_per_prompt": 4, "max_new_tokens": 6, "offload_frozen": stage != "online_dpo"},
              "train": {"seq_len": 48, "steps": 3, "eval_samples": 0, "backend": backend, "precision": "bf16" if backend == "te" else "fp32"}}
    lines = gpu.train(aligned, online)
    found = numbers(lines, "loss", "reward", "grad_norm")
    assert len(lines) == 3 and np.isfinite(found).all() and (found[:, 2] > 0).all(), lines
    if stage == "grpo":
        limit = 1e-6 if backend == "torch" else 1e-3  # in bf16 a kernel that keeps what a backward pass needs may round otherwise than one that does not
        assert abs(lines[0]["kl/reference"]) < limit, lines[0]  # nothing was learned yet


# --- feeding ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    {"prefetch": 0}, {"buffer": "plain"}, {"feed": "copy", "prefetch": 3, "threads": 2},
    pytest.param({"feed": "dali"}, marks=pytest.mark.skipif(not importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else True,
                                                             reason="needs NVIDIA DALI")),
], ids=str)
def test_ways_of_feeding_change_nothing(plain, tmp_path, data):
    same = {"run": {"deterministic": True}}
    usual, other = (gpu.train(plain, same, at(tmp_path, name), {"data": change}) for name, change in (("usual", {}), ("other", data)))
    assert np.array_equal(numbers(other, "loss", "grad_norm"), numbers(usual, "loss", "grad_norm"))


@needs_two
def test_the_first_rank_may_read_for_both(plain, tmp_path):
    layout = {"parallel": {"tp": 2}}
    usual, first = (gpu.train(plain, layout, at(tmp_path, who), {"data": {"read_on": who}}, num_ranks=2) for who in ("every_rank", "first_rank"))
    np.testing.assert_allclose(numbers(first, "loss"), numbers(usual, "loss"), rtol=1e-5)


@needs_two
@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "sequence_parallel": True, "etp": 1, "ep": 2}], ids=str)
def test_expert_layouts_equal_one_gpu(plain, tmp_path, layout):
    mixture = {**plain, "model": {**parity_table.MODELS["moe"], "vocab_size": plain["model"]["vocab_size"]}}
    one = gpu.train(mixture, at(tmp_path, "one"))
    two = gpu.train(mixture, at(tmp_path, "two"), {"parallel": layout}, num_ranks=2)
    np.testing.assert_allclose(numbers(two, "loss"), numbers(one, "loss"), rtol=1e-3)
