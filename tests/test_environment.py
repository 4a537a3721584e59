"""engine/environment.py: what a configuration sets for CUDA, NCCL and Transformer Engine, and that the user's own values stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import environment
from engine.config import validate


def test_the_variables_are_there_before_cuda_starts():
    """engine.mcore looks for a GPU when it is imported, which starts CUDA."""
    code = ("import sys; from types import SimpleNamespace as S; from engine import cli, environment\n"
            "environment.apply = lambda run: print('engine.mcore' in sys.modules)\n"
            "cli._acted(lambda run: 0, S(run=S(device='auto'))); cli._acted(lambda run: 0, S(run=S(device='cpu')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "False\n", done.stderr[-2000:]


def run_of(**sections):
    model = {"family": "llama", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    return validate({"run": {"dir": "unused"}, "model": model, "data": {"train": ["unused"]}, "train": {
        "seq_len": 64, "global_batch": 8, "steps": 1, **sections.pop("train", {})}, **sections})


@pytest.mark.parametrize("sections, variable, value, without", [
    ({"parallel": {"nvls": True}}, "NCCL_NVLS_ENABLE", "1", "0"),
    ({}, "TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "1"),
    ({"parallel": {"tp": 2, "sequence_parallel": True}}, "CUDA_DEVICE_MAX_CONNECTIONS", "1", None),
    ({"parallel": {"cp": 2}}, "CUDA_DEVICE_MAX_CONNECTIONS", "1", None),
    ({"parallel": {"pp": 2}}, "NCCL_P2P_NET_CHUNKSIZE", "2097152", None),
    ({"parallel": {"pp": 2, "p2p_chunk_kib": 512}}, "NCCL_P2P_NET_CHUNKSIZE", "524288", None),
    ({"parallel": {"overlap_grad_reduce": True}}, "NVTE_FWD_LAYERNORM_SM_MARGIN", "16", None),
    ({"parallel": {"overlap_grad_reduce": True, "norm_sm_margin": 8}}, "NVTE_BWD_LAYERNORM_SM_MARGIN", "8", None),
    ({"train": {"cuda_graphs": True}}, "NCCL_GRAPH_REGISTER", "0", None),
    ({"train": {"fp8": {"recipe": "delayed"}}}, "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1", None),
    ({"run": {"dir": "unused", "deterministic": True}}, "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", None),
    ({"run": {"dir": "unused", "deterministic": True}}, "CUBLAS_WORKSPACE_CONFIG", ":4096:8", None),
    ({"run": {"dir": "unused", "deterministic": True}}, "NCCL_ALGO", "^NVLS", None),
])
def test_a_switch_sets_its_variable_and_gives_way_to_the_users(monkeypatch, sections, variable, value, without):
    monkeypatch.setattr(os, "environ", {})
    run = run_of(**sections)
    assert environment.wanted(run_of()).get(variable) == without
    environment.apply(run)
    assert os.environ[variable] == environment.in_effect()[variable] == value
    os.environ[variable] = "mine"
    environment.apply(run)
    assert environment.in_effect()[variable] == "mine"


@pytest.mark.parametrize("parallel, variable", [({"pp": 2, "p2p_chunk_kib": 0}, "NCCL_P2P_NET_CHUNKSIZE"),
                                                ({"overlap_grad_reduce": True, "norm_sm_margin": 0}, "NVTE_FWD_LAYERNORM_SM_MARGIN")])
def test_zero_leaves_a_variable_alone(parallel, variable):
    assert variable not in environment.wanted(run_of(parallel=parallel))


def test_what_is_no_business_of_a_gpu_is_not_told(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HF_TOKEN": "secret", "PATH": "/bin", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "1"})
    assert environment.in_effect() == {"CUDA_VISIBLE_DEVICES": "1", "NCCL_DEBUG": "INFO"}
