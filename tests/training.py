"""A tiny corpus, and functions that run on ranks: train a configuration and say what happened. Pickled to ranks.py, so in a module."""

from pathlib import Path

import numpy as np

EOD, VOCAB, SEQ = 3, 61, 32
MOE = {"num_experts": 4, "top_k": 2, "aux_loss_coeff": 0.01, "z_loss_coeff": 1e-3}


def write_corpus(prefix, num_documents=60, seed=0, vocab=VOCAB):
    """Documents of 5 to 60 tokens that repeat a short pattern, so that a model can learn them; each ends in EOD."""
    from engine.data.indexed import IndexedWriter

    random = np.random.RandomState(seed)
    writer = IndexedWriter(str(prefix), np.uint16)
    for _ in range(num_documents):
        pattern = random.randint(4, vocab, random.randint(2, 6))
        writer.add_document(np.append(np.resize(pattern, random.randint(5, 60)), EOD).astype(np.uint16))
    writer.finalize()
    return str(prefix)


def small_run(corpus, folder):
    """A nested dict for engine.config.validate: a small dense model over the tiny corpus, documents masked."""
    return {
        "run": {"dir": str(folder / "run"), "device": "cpu", "seed": 11},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
                  "num_query_groups": 2, "vocab_size": VOCAB},
        "parallel": {},
        "data": {"train": [corpus["train"]], "valid": {"held_out": [corpus["valid"]]}, "eod_id": EOD, "reset_at_eod": True},
        "train": {"seq_len": SEQ, "global_batch": 4, "steps": 6, "precision": "fp32", "eval_samples": 4},
        "optim": {"lr": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 2, "wsd_decay_steps": 2},
        "log": {"tensorboard": False, "every": 1},
    }


def merged(raw: dict, *changes: dict) -> dict:
    """raw with nested changes laid over it."""
    for change in changes:
        raw = {**raw, **{k: merged(raw.get(k, {}), v) if isinstance(v, dict) else v for k, v in change.items()}}
    return raw


def train(raw: dict, world_size: int) -> list[dict]:
    """Run engine.train; the training lines of metrics.jsonl so far."""
    from engine import train as loop
    from engine.config import validate
    from engine.log import read_metrics

    run = validate(raw, world_size)
    loop.train(run)
    return read_metrics(run.run.dir) if Path(run.run.dir, "metrics.jsonl").exists() else []


def on_ranks(num_ranks: int, raw: dict) -> list[dict]:
    import ranks

    return ranks.run(num_ranks, train, raw, num_ranks)[0]
