"""What a stage came to: its numbers by name, whether its gates are open, and whether its loss jumped where it began.

    numbers = numbers_of(step)                 # {"train/loss": .., "held_out/valid_loss": .., "held_out/accuracy": ..}
    verdict = judge(gate, numbers, measured, earlier)
    found = boundary(step, parent, spike)      # {"start_ratio": .., "rise": ..}

The spike rule has two halves. Start: where a stage validates before its first step (train.eval_at_start) on the set on which the stage before
it ended, both with the same files, length, number of samples and kind of loss, the ratio of the two losses. Rise: within the first
`spike.share` of its steps, how far the running mean of `spike.window` training losses rises above its first value, as a share of that.
Either above `spike.tolerance` is reported. Left out: judging rewards and advantages, whose scale says nothing, by that rule.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.log import LM_STAGES, flatten, read_metrics
from engine.recipe.plan import Measure, Step
from engine.recipe.sections import Gate, Spike
from engine.stages import TEXT

LIKELIHOOD_STAGES = (*LM_STAGES, "reward", "dpo")      # their losses are positive and fall as the model learns


class GateError(ValueError):
    """A gate asks for a number that was not measured; the message lists those that were."""


@dataclass(frozen=True)
class Verdict:
    """A gate and what came of it. on_failure and rollback_to matter where it did not pass."""

    what: str
    value: float
    limit: float
    passed: bool
    on_failure: str
    rollback_to: str

    def __str__(self) -> str:
        return f"{self.what}: it is {self.value:.4g}"

    def record(self) -> dict:
        return asdict(self)


def last_numbers(folder: Path, split: str) -> dict[str, float]:
    """The numbers of the last line of a split of a run's metrics.jsonl; {} where there is none. What was not finite is nan."""
    lines = read_metrics(folder, split) if (folder / "metrics.jsonl").is_file() else []
    if not lines:
        return {}
    return flatten({key: math.nan if value is None else value for key, value in lines[-1].items() if key not in ("step", "split")})


def numbers_of(step: Step) -> dict[str, float]:
    """Every number of a finished stage, as set/metric."""
    return {f"{split}/{key}": value for split in ("train", *step.sets) for key, value in last_numbers(step.result, split).items()}


def measured_numbers(measure: Measure, folder: Path) -> dict[str, float]:
    """The numbers of one evaluation, by metric."""
    return last_numbers(folder, measure.set)


def judge(gate: Gate, name: str, numbers_after, rollback_to: str) -> Verdict:
    """numbers_after(stage): every number after a stage, as set/metric and measure/metric. Raises GateError where it lacks the gate's."""
    value = _found(gate, name, numbers_after(name))
    least = gate.at_least is not None or gate.at_least_of
    other = gate.at_least_of or gate.at_most_of
    if other:
        limit = _found(gate, other, numbers_after(other)) * gate.times + gate.plus - gate.minus
    else:
        limit = gate.at_least if least else gate.at_most
    passed = value >= limit if least else value <= limit      # False for nan, on either side
    what = f"{key_of(gate)} at {'least' if least else 'most'} {limit:.4g}" + (f" ({_formula(gate, other)})" if other else "")
    return Verdict(what, value, limit, passed, gate.on_failure, rollback_to if gate.on_failure == "rollback" else "")


def key_of(gate: Gate) -> str:
    return f"{gate.measure or gate.set}/{gate.metric}"


def _formula(gate: Gate, other: str) -> str:
    return other + f" * {gate.times:g}" * (gate.times != 1) + f" + {gate.plus:g}" * (gate.plus != 0) + f" - {gate.minus:g}" * (gate.minus != 0)


def _found(gate: Gate, stage: str, numbers: dict[str, float]) -> float:
    key = key_of(gate)
    if key not in numbers:
        raise GateError(f"a gate asks for {key} after {stage}, which was not measured; there are {', '.join(sorted(numbers)) or 'no numbers'}")
    return numbers[key]


def boundary(step: Step, parent: Step | None, spike: Spike) -> dict[str, float]:
    """What is known of the loss where a stage begins: before, start, start_ratio (and set), first, peak, peak_step, rise. Absent: not known."""
    found = {}
    for name in _shared_sets(step, parent) if parent else ():
        before, start = last_numbers(parent.result, name).get("valid_loss"), read_metrics(step.folders[0], name)
        if before and start and start[0]["step"] == 0 and start[0]["valid_loss"] is not None:
            found |= {"set": name, "before": before, "start": start[0]["valid_loss"], "start_ratio": start[0]["valid_loss"] / before}
            break
    losses = [line["loss"] for line in curve(step)[0]] if step.kind in LIKELIHOOD_STAGES else []
    losses = [math.nan if loss is None else loss for loss in losses]
    if len(losses) > spike.window:
        horizon = max(math.ceil(spike.share * len(losses)), spike.window + 1)
        means = [sum(losses[i:i + spike.window]) / spike.window for i in range(horizon - spike.window + 1)]
        peak = max(range(len(means)), key=lambda i: means[i])
        if means[0] > 0:
            found |= {"first": means[0], "peak": means[peak], "peak_step": peak + spike.window, "rise": means[peak] / means[0] - 1}
    return found


def spike_sentences(name: str, found: dict, spike: Spike) -> list[str]:
    """One sentence for each half of the rule that is broken."""
    sentences = []
    if found.get("start_ratio", 0) > 1 + spike.tolerance:
        sentences.append(f"{name}: loss spike at its start: {found['start']:.4f} on {found['set']} before its first step, "
                         f"{found['start_ratio']:.2f} times the {found['before']:.4f} at which the stage before it ended")
    if found.get("rise", 0) > spike.tolerance:
        sentences.append(f"{name}: loss spike after its start: the mean training loss rose from {found['first']:.4f} to {found['peak']:.4f} "
                         f"(+{found['rise']:.0%}) by step {found['peak_step']}")
    return sentences


def _shared_sets(step: Step, parent: Step) -> list[str]:
    """Validation sets on which the last loss of the parent and the first of the step mean the same."""
    ours, theirs = step.runs[0], parent.runs[-1]
    same_loss = step.kind == parent.kind or (step.kind in TEXT and parent.kind in TEXT)
    rows, before = ((run.train.seq_len, run.train.eval_samples, run.data.tokenizer) for run in (ours, theirs))
    if not (same_loss and rows == before and ours.train.eval_samples and ours.train.eval_at_start):
        return []
    same_cut = ours.data.split and (ours.data.split, ours.data.train) == (theirs.data.split, theirs.data.train)
    return ["valid"] if same_cut else [name for name, files in ours.data.valid.items() if theirs.data.valid.get(name) == files]


def curve(step: Step) -> list[list[dict]]:
    """The training lines of each of its runs (one, or one per rung)."""
    return [read_metrics(folder) if (folder / "metrics.jsonl").is_file() else [] for folder in step.folders]


def validation_curves(step: Step) -> dict[str, list[tuple[int, float]]]:
    """(step of the whole stage, loss) by validation set; the steps of a ladder's rungs are counted on."""
    curves, offset = {}, 0
    for folder, lines in zip(step.folders, curve(step)):
        for name in [name for name in step.sets if name != step.kind] if lines else ():
            curves.setdefault(name, []).extend((offset + line["step"], line["valid_loss"]) for line in read_metrics(folder, name)
                                               if line.get("valid_loss") is not None)
        offset += lines[-1]["step"] if lines else 0
    return {name: points for name, points in curves.items() if points}


def median_step_seconds(step: Step) -> float | None:
    """Of the steps it has taken so far, the first left out; None before its third."""
    lines = [line for part in curve(step) for line in part[1:]]
    seconds = sorted(line["step_time_s"] for line in lines)
    return seconds[len(seconds) // 2] if len(seconds) > 1 else None
