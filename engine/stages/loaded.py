"""What the checkpoint that a stage starts from says about itself, read without its tensors, torch or ranks.

    folder = loaded.folder(run)               # of checkpoint.load, or a ConfigError
    lr = loaded.last_lr(folder)               # rate of the last step it took
    loaded.config(folder), loaded.position(folder)

Left out: the tensors (engine/mcore/checkpoint.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path

from engine import schedule
from engine.config import ConfigError, RunConfig
from engine.foreign import written_config
from engine.run_folder import find


def required(run) -> str:
    """checkpoint.load, which this stage cannot do without. Raises ConfigError."""
    if not run.checkpoint.load:
        raise ConfigError([f"stage={run.stage} goes on from a trained model, but checkpoint.load is empty; name a run's folder or a checkpoint"])
    return run.checkpoint.load


def folder(run) -> Path:
    """The iter_ folder that checkpoint.load means: itself, or the newest complete one below it. Raises ConfigError."""
    found = find(required(run))
    if found is None:
        raise ConfigError([f"checkpoint.load={run.checkpoint.load} holds no complete checkpoint (iter_*/metadata.json); name one"])
    return found


def config(folder: Path) -> RunConfig:
    """The configuration of the run that wrote it. Raises ConfigError where it cannot be read."""
    return _read(folder / "config.yaml", lambda path: RunConfig.model_validate(written_config(path.parent)))


def position(folder: Path) -> Mapping[str, int]:
    """step, consumed_samples and tokens. Raises ConfigError where it cannot be read."""
    names = ("step", "consumed_samples", "tokens")
    return _read(folder / "position.json", lambda path: {name: int(json.loads(path.read_text())[name]) for name in names})


def last_lr(folder: Path) -> float:
    """Learning rate of the last step before the checkpoint was written; 0 when it took none."""
    run, step = config(folder), position(folder)["step"]
    return schedule.learning_rate(step, run.optim, run.schedule, run.train.steps) if step else 0.0


def _read(path: Path, parse):
    try:
        return parse(path)
    except Exception as error:  # whatever a damaged file makes yaml, json or pydantic raise
        raise ConfigError([f"checkpoint.load: {path} cannot be read ({type(error).__name__}: {error}); name another checkpoint"]) from error
