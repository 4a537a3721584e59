"""What a run is asked from outside, and what goes wrong inside a step: agreed over all ranks, so that all of them do the same.

    switches = Switches(run, signals)
    asked = switches.ask()              # after every step; collective
    asked.save, asked.leave             # save now; end as "done", "requeue" or "stopped"

Signals (engine/signals.py) reach any rank, the files RUN/SAVE and RUN/STOP and the clock of train.max_minutes are rank 0's; one all-reduce of
a few bytes makes them the same on every rank. docs/faults.md has a table of all faults.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


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
        self.started = time.monotonic()
        if self.is_first:
            self.stop_file.unlink(missing_ok=True)  # of the run that it has stopped

    def ask(self) -> Asked:
        """Collective."""
        received, save, stop, is_over = agreed_highest(self._own())
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
        is_over = 0 < self.max_seconds < time.monotonic() - self.started
        return [received, int(self.save_file.exists()), int(self.stop_file.exists()), int(is_over)]


def agreed_highest(numbers: list[int]) -> list[int]:
    """The highest of each number over all ranks. Collective."""
    if dist.get_world_size() == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(numbers, dtype=torch.int32, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
