"""What the exit codes of a run's ranks mean together, and whether it is started again.

    code = judge([-9, 1], told=())               # 1: a fault
    verdict = Restarts(limit=3).after(code, step)

An exit code is subprocess's: negative for the signal that ended the process. Only restarts without progress count, so a run of months that
loses a rank every day goes on, and one that cannot start ends after a few tries. Pure: no processes, no clock.
"""

from collections.abc import Collection
from dataclasses import dataclass

OK, ERROR, USAGE, REQUEUE = 0, 1, 2, 75  # as in engine/cli.py, which would import psutil and more


def judge(codes: Collection[int | None], told: Collection[int]) -> int:
    """The exit code of a launch. codes: of all its ranks, None where a rank's machine was lost. told: signals that were handed to the ranks."""
    if all(code == OK for code in codes):
        return OK
    if USAGE in codes:
        return USAGE
    if None in codes:
        return ERROR
    if all(code in (OK, REQUEUE) for code in codes):
        return REQUEUE
    # A rank that was only starting dies of the signal, and its peers of the loss; nothing was to be saved.
    return REQUEUE if told and any(code == REQUEUE or -code in told for code in codes) else ERROR


@dataclass(frozen=True)
class Verdict:
    """relaunch after `delay` seconds, or end with `code`. reason: for a person."""

    relaunch: bool
    code: int
    delay: float
    reason: str


class Restarts:
    """Counts launches in a row that came no further than an earlier one.

    limit: how many of those are started again. first_delay, longest_delay: seconds before a restart; they double with each launch without
    progress. requeues: start again what asks to be requeued. furthest: steps that the run had taken before the first launch.
    """

    def __init__(self, limit: int, first_delay: float, longest_delay: float, requeues: bool, furthest: int):
        self.limit, self.first_delay, self.longest_delay, self.requeues = limit, first_delay, longest_delay, requeues
        self.furthest, self.in_vain = furthest, 0

    def after(self, code: int, step: int, is_stopping: bool) -> Verdict:
        """What follows a launch that ended with `code` at `step`. is_stopping: somebody has asked the supervisor to end."""
        self.in_vain = 0 if step > self.furthest else self.in_vain + 1
        self.furthest = max(self.furthest, step)
        if code == OK:
            return Verdict(False, code, 0, "done")
        if code == USAGE:
            return Verdict(False, code, 0, "a mistake in the configuration or the command, which starting again would not mend")
        if is_stopping:
            return Verdict(False, code, 0, "saved; the same command goes on from here" if code == REQUEUE else "failed while it was to stop")
        if code == REQUEUE and not self.requeues:
            return Verdict(False, code, 0, "saved; the same command goes on from here")
        if self.in_vain > self.limit:
            return Verdict(False, ERROR, 0, f"{self.in_vain} launches in a row came no further than step {self.furthest}; --max-restarts is {self.limit}")
        delay = 0.0 if code == REQUEUE else min(self.longest_delay, self.first_delay * 2 ** self.in_vain)
        without = f", {self.in_vain} of {self.limit} without progress" if self.in_vain else ""
        return Verdict(True, code, delay, f"starting again in {delay:g} s{without}")
