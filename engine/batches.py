"""The training data of a run, one global batch after another, and where that leaves it.

    with Feed(run, loader, position, stage.draws_freely) as feed:
        micro_batches = next(feed)                   # of this replica
        position = feed.position(before=position)    # after the step that used them

Left out: samples by number (engine/data/loader.py), copies to the device (engine/data/feed.py).
"""

import itertools
import time

from engine import profiling, schedule
from engine.data.loader import Loader, Prefetcher
from engine.mcore.checkpoint import Position


class Feed:
    """engine/stage.py's Feed: this replica's micro-batches, one global batch after another, from `position` on.

    freely: for as long as anybody asks; else for the planned steps. ahead: how many of the last global batches taken are for later
    steps and so do not count as consumed.
    """

    ahead = 0

    def __init__(self, run, loader, position: Position, freely: bool, copies=None):
        self.run, self.freely, self._waited = run, freely, 0.0
        self._start_copies = copies.start if copies else lambda micro_batches: None
        self.start(loader, position)

    def start(self, loader, position: Position) -> None:
        """Go on from `position`."""
        self.loader, self.step, self.ahead = loader, position.step, 0
        self._ends = [position.consumed_samples]  # of the global batches taken, from the last one that an earlier step used
        planned = None if self.freely else schedule.planned_steps(self.run.train) - position.step
        self._sizes, read = (global_batches(self.run.train, position.consumed_samples, planned) for _ in range(2))
        depth = self.run.data.prefetch
        self._batches = Prefetcher(loader, read, depth, self._start_copies) if depth else self._one_by_one(loader, read, self._start_copies)

    @staticmethod
    def _one_by_one(loader, positions, start):
        for position in positions:
            found = loader.batches(*position)
            start(found)
            yield found

    @profiling.phase("wait for data")
    def __next__(self):
        started = time.perf_counter()
        micro_batches = next(self._batches)
        self._waited += time.perf_counter() - started
        self._ends.append(sum(next(self._sizes)))
        return micro_batches

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.run.data.prefetch:
            self._batches.__exit__(*error)

    def close(self) -> None:
        """Read no further."""
        self.__exit__(None, None, None)

    def waited(self) -> float:
        """Seconds that the loop has waited for data since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def position(self, before: Position) -> Position:
        """Where the run stands after the step underway."""
        self._ends = self._ends[len(self._ends) - 1 - self.ahead:]
        used = self._ends[0]
        return Position(self.step, used, before.tokens + (used - before.consumed_samples) * self.run.train.seq_len)

    def samples(self) -> str:
        """What the step underway has read."""
        return f"samples {self._ends[0]} to {self._ends[-1] - 1}"

    def numbers(self, replica: int, micro_batches: list[int]) -> list[int]:
        """The samples of these micro-batches of a replica in the step underway; none where a stage makes its own batches of what it draws."""
        if self.freely:
            return []
        loader = Loader(self.loader.dataset, self.run.train.micro_batch, replica, self.loader.dp_size)
        rows = loader.sample_numbers(self._ends[0], self._ends[-1] - self._ends[0])
        return [int(number) for i in micro_batches for number in rows[i]]


def global_batches(train, consumed: int, num: int | None):
    """(first sample, samples) of the next global batches after `consumed` samples; num: how many, None without end."""
    for _ in itertools.count() if num is None else range(num):
        size = schedule.global_batch(consumed, train)
        yield consumed, size
        consumed += size
