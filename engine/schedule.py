"""Where training stands, as pure arithmetic: the learning rate and the global batch of any step, and the samples read before it.

    learning_rate(step, optim, schedule, total_steps)   what the optimizer step numbered `step` (from 1) is taken with
    global_batch(consumed_samples, train)               samples of the step that starts after `consumed_samples`
    consumed_samples_after(steps, train)                the data position after that many steps
    step_of_sample(sample, train)                       the step that reads a sample; the inverse

Numbers go in, numbers come out; no state, so that a resumed run, a planner and a plot compute the same values.
Left out: schedules counted in samples (ours count optimizer steps, also while the batch grows) and a growing weight decay.
"""

import math
from bisect import bisect_right
from functools import lru_cache

from engine.config import Optim, Schedule, Train


def learning_rate(step: int, optim: Optim, schedule: Schedule, total_steps: int) -> float:
    """Learning rate of the optimizer step about to be taken; `step` is its number, counted from 1.

    Step k runs at what megatron-core's OptimizerParamScheduler.get_lr answers for num_steps = k - 1, bit for bit when that
    class counts in steps: Megatron-LM, too, takes its first step before the scheduler first moves. So the warm-up starts
    at step 1 with init_lr, step warmup_steps + 1 runs at optim.lr, and min_lr would be reached at step decay_steps + 1:
    no step of a run whose decay_steps equals its steps is wasted on a rate of min_lr = 0.
    (Megatron-LM's console prints the rate of the step to come, which is one line off from ours.)

    total_steps: stands in for schedule.decay_steps where that is 0.
    """
    done = step - 1
    assert done >= 0, f"steps count from 1, not {step}"
    peak, decay_steps = optim.lr, schedule.decay_steps or total_steps
    if schedule.warmup_steps and done <= schedule.warmup_steps:
        return schedule.init_lr + (peak - schedule.init_lr) * done / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if done > decay_steps:
        return schedule.min_lr
    if schedule.kind == "inverse_sqrt":
        return max(schedule.min_lr, peak * max(schedule.warmup_steps, 1) ** 0.5 / max(done, 1) ** 0.5)
    return schedule.min_lr + _coefficient(done, schedule, decay_steps) * (peak - schedule.min_lr)


def _coefficient(done: int, schedule: Schedule, decay_steps: int) -> float:
    """Share of (optim.lr - min_lr) that is left after `done` steps."""
    if schedule.kind == "wsd":
        start = decay_steps - schedule.wsd_decay_steps
        return _decay(schedule.wsd_shape, (done - start) / schedule.wsd_decay_steps) if done > start else 1.0
    return _decay(schedule.kind, (done - schedule.warmup_steps) / (decay_steps - schedule.warmup_steps))


def _decay(shape: str, progress: float) -> float:
    """From 1 to 0 while progress goes from 0 to 1; the last two are tails of WSD (MiniCPM, arXiv 2404.06395; arXiv 2405.18392)."""
    match shape:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (math.cos(math.pi * progress) + 1.0)
        case "exponential":
            return 2.0 * math.pow(0.5, progress) - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(progress)
    raise AssertionError(f"no decay is called {shape}")


def global_batch(consumed_samples: int, train: Train) -> int:
    """Samples of the step that starts after `consumed_samples`, by the rule of megatron-core's ramp-up calculator.

    The ramp-up divides rampup.samples evenly over the increments; a step never changes its batch midway.
    """
    ramp = train.rampup
    return _batch_at(consumed_samples, ramp.start, ramp.increment, ramp.samples, train.global_batch)


def _batch_at(consumed: int, start: int, increment: int, samples: int, full: int) -> int:
    if not start or start == full or consumed > samples:
        return full
    samples_per_increment = samples / ((full - start) // increment)
    return start + int(consumed / samples_per_increment) * increment


def consumed_samples_after(steps: int, train: Train) -> int:
    """Samples read by the first `steps` steps: the position of the data, and the number of the next sample."""
    ends = _ramp_ends(train)
    if steps <= len(ends):
        return ends[steps - 1] if steps else 0
    return (ends[-1] if ends else 0) + (steps - len(ends)) * train.global_batch


def step_of_sample(sample: int, train: Train) -> int:
    """Number (from 1) of the step that reads the sample at position `sample` (from 0).

    So `step_of_sample(consumed_samples_after(n, train), train) == n + 1`.
    """
    ends = _ramp_ends(train)
    if ends and sample < ends[-1]:
        return bisect_right(ends, sample) + 1
    return len(ends) + (sample - (ends[-1] if ends else 0)) // train.global_batch + 1


def planned_steps(train: Train) -> int:
    """train.steps, or fewer where train.max_tokens ends the run first (with the step that reaches it)."""
    if not train.max_tokens:
        return train.steps
    last_sample = -(-train.max_tokens // train.seq_len) - 1
    return min(train.steps, step_of_sample(last_sample, train))


def _ramp_ends(train: Train) -> tuple[int, ...]:
    ramp = train.rampup
    return _ends(ramp.start, ramp.increment, ramp.samples, train.global_batch)


@lru_cache(maxsize=8)
def _ends(start: int, increment: int, samples: int, full: int) -> tuple[int, ...]:
    """Samples consumed at the end of every step whose batch is smaller than the full one."""
    ends, consumed = [], 0
    while (batch := _batch_at(consumed, start, increment, samples, full)) < full:
        consumed += batch
        ends.append(consumed)
    return tuple(ends)
