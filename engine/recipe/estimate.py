"""What a plan will cost: steps, tokens, FLOPs and time of each stage, and what the time is based on.

    estimate(step, plan, speed=0)       # Estimate(steps, tokens, flops, seconds, basis)

Time is taken, in this order, from the stage's own steps so far, from `speed` (tokens per second), from the TFLOP/s that earlier stages
reached per rank, and from hardware.peak_tflops * hardware.mfu. Counted are the samples at their full length and the network that learns;
shorter rows make it less, references, rollouts and validation make it more.
"""

import math
from dataclasses import dataclass

from engine import metrics, schedule
from engine.recipe.outcome import curve, median_step_seconds
from engine.recipe.plan import Plan, Step

ROWS_PER_SAMPLE = {"reward": 2, "dpo": 2}      # pairs


@dataclass(frozen=True)
class Estimate:
    """seconds: nan where nothing tells them. tokens: of all steps; flops: forward and backward, all ranks together."""

    steps: int
    tokens: int
    flops: float
    seconds: float
    basis: str


def estimate(step: Step, plan: Plan, speed: float = 0.0) -> Estimate:
    """speed: tokens per second of all ranks together, 0 where the user does not say."""
    steps = tokens = flops = 0
    for run in step.runs:
        planned = schedule.planned_steps(run.train)
        samples = schedule.consumed_samples_after(planned, run.train) * ROWS_PER_SAMPLE.get(step.kind, 1)
        steps, tokens = steps + planned, tokens + samples * run.train.seq_len
        flops += metrics.step_flops(run.model, run.train.seq_len, samples)
    seconds, basis = _time(step, plan, speed, steps, tokens, flops)
    return Estimate(steps, tokens, flops, seconds, basis)


def _time(step: Step, plan: Plan, speed: float, steps: int, tokens: int, flops: float) -> tuple[float, str]:
    own = median_step_seconds(step)
    if own is not None:
        return steps * own, "its own steps so far"
    if speed:
        return tokens / speed, f"--speed {speed:g} tokens/s"
    earlier = [(name, rate) for name, rate in ((other.name, _reached_tflops(other)) for other in plan.steps) if rate]
    if earlier:
        name, rate = earlier[-1]
        return flops / (step.ranks * rate * 1e12), f"{rate:.3g} TFLOP/s per rank, as {name} reached"
    hardware = plan.recipe.hardware
    if hardware.peak_tflops:
        rate = hardware.peak_tflops * hardware.mfu
        return flops / (step.ranks * rate * 1e12), f"{hardware.mfu:.0%} of {hardware.peak_tflops:g} TFLOP/s per rank, assumed"
    return math.nan, "nothing; give --speed, or hardware.peak_tflops in the recipe"


def _reached_tflops(step: Step) -> float | None:
    rates = sorted(line["tflops_per_device"] for part in curve(step) for line in part[1:])
    return rates[len(rates) // 2] if rates else None
