"""Annealing: the last stretch of pretraining, in which the learning rate falls to its end on the best data.

    stage: anneal
    checkpoint: {load: runs/base}
    data: {train: [0.6, textbooks, 0.4, web]}
    anneal: {shape: linear}                        # from where the loaded checkpoint stopped to schedule.min_lr
    average: {kind: uniform, start: 0.5}           # Llama 3 (arXiv 2407.21783, 3.4.3) averages the checkpoints of this stage

The rate of step 1 is anneal.start_lr, or that of the last step before the checkpoint; it falls by anneal.shape over all steps of the
run and would reach schedule.min_lr one step after the last. In the fields of `schedule` that is a wsd decay as long as the run.
Left out: choosing the data, and a warm-up.
"""

from engine import schedule
from engine.config import ConfigError
from engine.stages import loaded
from engine.stages.pretrain import Pretrain


class Anneal(Pretrain):
    def configure(self, run):
        """Raises ConfigError without checkpoint.load, and where the rate it starts from is not above schedule.min_lr."""
        lr, steps = _start_lr(run), schedule.planned_steps(run.train)
        tail = {"kind": "wsd", "warmup_steps": 0, "decay_steps": steps, "wsd_decay_steps": steps, "wsd_shape": run.anneal.shape}
        return run.model_copy(update={
            "optim": run.optim.model_copy(update={"lr": lr}),
            "schedule": run.schedule.model_copy(update=tail),
            "checkpoint": run.checkpoint.model_copy(update={"load_position": False}),
        })


def _start_lr(run) -> float:
    name = loaded.required(run)
    lr = run.anneal.start_lr or loaded.last_lr(loaded.folder(run))
    source = f"anneal.start_lr({lr:g})" if run.anneal.start_lr else f"the rate at which checkpoint.load={name} stopped({lr:g})"
    if lr <= run.schedule.min_lr:
        raise ConfigError([f"{source} is not above schedule.min_lr({run.schedule.min_lr:g}), so there is nothing to anneal; set anneal.start_lr"])
    return lr
