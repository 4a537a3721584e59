"""What a run is asked from outside, and what goes wrong inside a step: agreed over all ranks, so that all of them do the same.

    switches = Switches(run, signals)
    guard = Guard(run.faults, switches, log.note)
    why_not = guard.verdict(name, model, result, norm, feed)      # before every update; empty: it may be taken
    asked = switches.ask()                                        # after every step: save now? end, and how?

Signals (engine/signals.py) reach any rank, the files RUN/SAVE and RUN/STOP and the clock of train.max_minutes are rank 0's, and a loss or a
gradient may be wrong on one rank alone. One all-reduce of a few bytes carries all of it. It comes right before the optimizer's update, where
the host has just waited for the gradient norm: a GPU then has nothing else to do, so the host does not wait for work that it could run ahead of.
What comes later in a step is heard in the next one. Left out: faults that end a process, and checkpoints.
"""

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

MANY = 4  # names that one message tells
NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class TrainingStopped(ValueError):
    """Training cannot go on without a person."""


@dataclass(frozen=True)
class Asked:
    """What all ranks do next. leave: how the run ends, empty: it goes on; reason: why."""

    save: bool = False
    leave: str = ""
    reason: str = ""


class Switches:
    """The ways to ask a running job for something. run: the whole one's, whose folder holds the files. signals: engine/signals.py's, or None."""

    def __init__(self, run, signals=None):
        self.signals, self.max_seconds = signals, 60 * run.train.max_minutes
        self.save_file, self.stop_file = (Path(run.run.dir) / name for name in ("SAVE", "STOP"))
        self.is_first = dist.get_rank() == 0
        self.started = self._heard = None
        if self.is_first:
            self.stop_file.unlink(missing_ok=True)  # of the run that it has stopped

    def agree(self, numbers: list[int]) -> list[int]:
        """The highest of each number over all ranks; what is asked from outside goes along. Collective."""
        own = self._own()
        found = _highest(own + numbers)
        self._heard = found[:len(own)]
        return found[len(own):]

    def ask(self) -> Asked:
        """What was asked by the last update of this step. Collective where there was none."""
        if self._heard is None:
            self.agree([])
        (received, save, stop, is_over), self._heard = self._heard, None
        if stop:
            return Asked(leave="stopped", reason=f"{self.stop_file} was there")
        if received:
            return Asked(leave="requeue", reason=f"{signal.Signals(received).name} came")
        return Asked(save=bool(save), leave="done" if is_over else "")

    def was_saved(self) -> None:
        """The checkpoint that RUN/SAVE asked for is there."""
        if self.is_first:
            self.save_file.unlink(missing_ok=True)

    def _own(self) -> list[int]:
        received = self.signals.received if self.signals else 0
        if not self.is_first:
            return [received, 0, 0, 0]
        is_over = self.started is not None and 0 < self.max_seconds < time.monotonic() - self.started
        self.started = self.started or time.monotonic()  # when it is first asked, before a step: every start takes one at least
        return [received, int(self.save_file.exists()), int(self.stop_file.exists()), int(is_over)]


def _highest(numbers: list[int]) -> list[int]:
    if dist.get_world_size() == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(numbers, dtype=torch.int32, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


class Guard:
    """Judges each update before it is taken. note: tells a person."""

    wants_rollback = ""
    """Why this step asks to go back to a checkpoint; see engine/rollback.py."""

    def __init__(self, settings, switches: Switches, note: Callable[[str], None]):
        self.settings, self.switches, self.note = settings, switches, note
        self.spikes = Spikes(settings.spike_window)
        self.skips_in_row: dict[str, int] = {}  # by role
        self.found: dict = {}

    def verdict(self, name: str, model, result, norm: float | None, feed, is_first: bool) -> str:
        """Why this update must not be taken, the same on every rank; empty: it may. norm: None where fp16's scaler has skipped it. Collective.

        Raises TrainingStopped where faults.nonfinite is stop, or after faults.max_skips_in_row.
        """
        deviation = self.spikes.deviation(result.loss) if is_first and self.settings.spike != "off" else 0.0
        own = [not math.isfinite(result.loss), norm is not None and not math.isfinite(norm), deviation > self.settings.spike_factor]
        is_loss_bad, is_norm_bad, is_spike = self.switches.agree([int(flag) for flag in own])
        why, is_bad = "", is_loss_bad or is_norm_bad
        if is_bad:
            what = "loss" if is_loss_bad else "gradient norm"
            why = self._told(what if is_first else f"{name}'s {what}", result.loss if is_loss_bad else norm, model, feed)
        elif is_spike:
            why = self._judged_spike(result.loss, deviation, feed)
        if is_first and not is_loss_bad:
            self.spikes.add(result.loss)
        if why:
            self._skip(name, why, feed, stops=is_bad and self.settings.nonfinite == "stop")
        elif norm is not None:
            self.skips_in_row[name] = 0
        return why

    def report(self) -> dict:
        """What belongs in the record of the step just taken."""
        found, self.found = self.found, {}
        return found

    def state(self) -> dict:
        """What a checkpoint must hold to go on as if never stopped."""
        return {"losses": list(self.spikes.losses), "skips_in_row": self.skips_in_row}

    def restore(self, state: Mapping) -> None:
        self.spikes.losses = deque(state.get("losses", ()), maxlen=self.settings.spike_window)
        self.skips_in_row = dict(state.get("skips_in_row", {}))

    def _judged_spike(self, loss: float, deviation: float, feed) -> str:
        """Why a spike lets no update be taken; empty where it is only told. Collective, for one rank alone may have seen it."""
        own = (deviation, f"the loss is {loss:.6g} on {feed.samples()}, {deviation:.3g} standard deviations above "
                          f"{statistics.median(self.spikes.losses):.6g}, the median of the last {len(self.spikes.losses)}")
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
        self.found["spike"], why = max(found)
        if self.settings.spike == "warn":
            self.note(f"step {feed.step}: {why}")
            return ""
        if self.settings.spike == "rollback":
            self.wants_rollback = why
        return why

    def _told(self, what: str, value: float, model, feed) -> str:
        """A sentence about a number that is not finite, with what every rank knows of where it comes from. Collective."""
        place = model.topology
        own = (place.rank, place.dp_rank, value, *model.where_not_finite())
        found = [own] * place.world_size
        dist.all_gather_object(found, own)
        value = next(value for _, _, value, _, _ in found if value is not None and not math.isfinite(value))
        losses = {replica: batches for _, replica, _, batches, _ in found if batches}
        origins = [f"replica {replica}" + (f": samples {listed(numbers)}" if (numbers := feed.numbers(replica, batches)) else "")
                   for replica, batches in losses.items()]
        if not origins:
            origins = [f"rank {rank}: {listed(names)}" for rank, _, _, _, names in found if names]
        return f"the {what} is {value} on {feed.samples()}" + (f" ({listed(origins, '; ')})" if origins else "")

    def _skip(self, name: str, why: str, feed, stops: bool) -> None:
        self.found["why"] = "; ".join(filter(None, (self.found.get("why"), why)))
        num = self.skips_in_row[name] = self.skips_in_row.get(name, 0) + (not self.wants_rollback)
        if stops or num >= self.settings.max_skips_in_row:
            before = f"; {num} updates in a row were to be skipped" if num > 1 else ""
            raise TrainingStopped(f"step {feed.step}: {why}{before}; this update changed no weight. "
                                  "Lower optim.lr, look at these samples (data_tools/which.py, peek.py), or resume from an earlier checkpoint")
        self.note(f"step {feed.step}: update skipped, {why}")


def listed(things, comma: str = ", ") -> str:
    """The first few of them."""
    things = list(map(str, things))
    return comma.join(things[:MANY]) + (f"{comma}and {len(things) - MANY} more" if len(things) > MANY else "")


class Spikes:
    """The recent losses, and how far above them one is. Spikes are among them, so that after half a window a new level is the usual one."""

    def __init__(self, window: int):
        self.losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def deviation(self, loss: float) -> float:
        """How many standard deviations `loss` lies above the median, these estimated by the median absolute deviation (at least a thousandth
        of the median, since losses that do not move are no scale); 0 while less than half a window is known."""
        if 2 * len(self.losses) < self.losses.maxlen or not math.isfinite(loss):
            return 0.0
        median = statistics.median(self.losses)
        scale = max(NORMAL * statistics.median(abs(x - median) for x in self.losses), 1e-3 * abs(median), 1e-12)
        return max(0.0, (loss - median) / scale)
