"""Functions that run on ranks: train a configuration and say what happened. Imported by tests, pickled to ranks.py."""

from pathlib import Path

MOE = {"num_experts": 4, "top_k": 2, "aux_loss_coeff": 0.01, "z_loss_coeff": 1e-3}


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
