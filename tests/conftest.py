"""Shared by all tests: a tiny corpus, a run configuration over it, and the ranks that stay up."""

import pytest
from training import EOD, SEQ, VOCAB, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return {"train": write_corpus(folder / "train"), "valid": write_corpus(folder / "valid", 20, seed=1)}


@pytest.fixture
def raw_run(corpus, tmp_path):
    """A nested dict for engine.config.validate: a small dense model over the tiny corpus, documents masked."""
    return {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "seed": 11},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
                  "num_query_groups": 2, "vocab_size": VOCAB},
        "parallel": {},
        "data": {"train": [corpus["train"]], "valid": {"held_out": [corpus["valid"]]}, "eod_id": EOD, "reset_at_eod": True},
        "train": {"seq_len": SEQ, "global_batch": 4, "steps": 6, "precision": "fp32", "eval_samples": 4},
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 2, "wsd_decay_steps": 2},
        "log": {"tensorboard": False, "every": 1},
    }


def pytest_sessionfinish(session, exitstatus):
    import sys

    if "ranks" in sys.modules:
        sys.modules["ranks"].shutdown()
