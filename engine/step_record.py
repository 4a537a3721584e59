"""What one step of a run amounts to: the updates of its roles, the time it took, and the line of metrics.jsonl about it.

    updates = Updates(trained)
    updates.add("policy", micro_batches, result, norm)       # for each optimizer step
    line = record(run, place, before, position, updates, lr, clock.lap(), model)

Left out: who writes it (engine/log.py).
"""

import gc
import time

import torch

from engine import metrics
from engine.mcore import observe
from engine.mcore.checkpoint import Position


class Updates:
    """What the optimizer steps of one step of the run found, by role, and the batches [rows of this replica, s] its first role learnt from."""

    def __init__(self, trained):
        self.first = next(iter(trained))
        self.sums, self.norms, self.shapes = {name: {} for name in trained}, {name: [] for name in trained}, []

    def add(self, name: str, micro_batches, result, norm: float | None) -> None:
        sums = self.sums[name]
        for key, (total, count) in result.sums.items():
            old_total, old_count = sums.get(key, (0.0, 0.0))
            sums[key] = (old_total + total, old_count + count)
        self.norms[name].append(norm)
        if name == self.first:
            rows, seq_len = micro_batches[0]["tokens"].shape
            self.shapes.append((rows * len(micro_batches), seq_len))

    def means(self, name: str) -> dict[str, float]:
        return {key: total / count if count else float("nan") for key, (total, count) in self.sums[name].items()}

    def norm(self, name: str) -> float:
        """Mean gradient norm of the updates that were taken; NaN without any."""
        taken = [norm for norm in self.norms[name] if norm is not None]
        return sum(taken) / len(taken) if taken else float("nan")


def record(run, place, before: Position, position: Position, updates: Updates, lr: float, seconds: float, model) -> dict:
    """One line of metrics.jsonl. Roles beside the first have their names before their numbers."""
    tokens = sum(rows * seq_len for rows, seq_len in updates.shapes) * place.dp
    flops = sum(metrics.step_flops(run.model, seq_len, rows * place.dp) for rows, seq_len in updates.shapes)
    tflops = metrics.tflops_per_device(flops, seconds, place.world_size)
    line = {
        "step": position.step,
        "loss": float("nan"),  # of a first role that did not learn
        "grad_norm": updates.norm(updates.first),
        "lr": lr,
        "consumed_samples": position.consumed_samples,
        "tokens": tokens,
        "step_time_s": seconds,
        "tokens_per_s": tokens / seconds,
        "global_batch": position.consumed_samples - before.consumed_samples,
        "tflops_per_device": tflops,
        "peak_memory_gib": metrics.peak_memory_gib(),
        "skipped": not any(norm is not None for norm in updates.norms[updates.first]),
        **updates.means(updates.first),
    }
    for name in updates.sums:
        if name != updates.first:
            line |= {f"{name}/{key}": mean for key, mean in {**updates.means(name), "grad_norm": updates.norm(name)}.items()}
    utilisation = metrics.mfu(tflops, _peak_tflops(run, place))
    if utilisation is not None:
        line["mfu"] = utilisation
    if run.train.precision == "fp16":
        line["loss_scale"] = model.loss_scale
    if run.model.moe.num_experts:
        line["moe"] = observe.moe_losses(model)
    if run.log.norms:
        line["norms"] = observe.layer_norms(model)
    return line


def _peak_tflops(run, place) -> float | None:
    if run.log.peak_tflops:
        return run.log.peak_tflops
    return metrics.peak_tflops(torch.cuda.get_device_name(), run.train.fp8.recipe != "none") if place.device == "cuda" else None


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


class Clock:
    """Time per step, and garbage collection at a fixed beat."""

    def __init__(self, run):
        self.last, self.beat = time.monotonic(), run.train.manual_gc
        if self.beat:
            gc.disable()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds

    def collect_garbage(self, step: int) -> None:
        if due(self.beat, step):
            gc.collect(1)
