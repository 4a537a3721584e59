"""Rows of the table that benchmarks/data.py prints: what was done, by whom, how long it took, and what was aimed at.

Each `benchmarks/_data_NAME.py` exposes `rows(rounds, quick)`, an iterator of Row: `quick` asks for a small input that only shows that everything
runs. A typical module:

    def rows(rounds: int, quick: bool) -> Iterator[Row]:
        peer = optional("datasketch", lambda: peer_step(texts))            # None, and a line that says so, when it is not installed
        turns = interleaved({"datasketch": peer, "ours": our_step(texts)}, rounds)
        yield row("dedup, 20,000 documents", turns, speed(turns), ">= 10x", note="same clusters")

The first contestant is the peer, the last is ours. All take turns in one process, so that a slow minute of the machine is everybody's; the
medians over the rounds count. CPU seconds are those of all threads and of the children that ended within the step.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table. peer_seconds and peer_cpu are None where the peer is not installed."""

    work: str
    peer: str
    peer_seconds: float | None
    our_seconds: float
    peer_cpu: float | None
    our_cpu: float
    ratio: str
    goal: str
    note: str = ""


@dataclass
class Turns:
    """What one contestant did in its rounds."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    answer: Any = None
    """What its last step returned: compare it with the other's."""

    def median(self) -> float:
        return statistics.median(self.seconds)

    def median_cpu(self) -> float:
        return statistics.median(self.cpu_seconds)


def interleaved(contestants: Mapping[str, Callable[[], Any] | None], rounds: int, warm_up: bool = True,
                before: Callable[[], Any] | None = None) -> dict[str, Turns]:
    """Turns by name of those contestants that are not None: one step each, round by round, after one step each that is not counted.
    before: done before every step, outside the measured time."""
    steps = {name: step for name, step in contestants.items() if step is not None}
    if warm_up:
        for step in steps.values():
            step()
    turns = {name: Turns() for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            own = turns[name]
            own.answer = None      # given back outside the measured time
            if before is not None:
                before()
            start, start_cpu = time.perf_counter(), _cpu_seconds()
            own.answer = step()
            own.seconds.append(time.perf_counter() - start)
            own.cpu_seconds.append(_cpu_seconds() - start_cpu)
    return turns


def optional(name: str, build: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | None:
    """What build returns, or None and a printed line when a library it imports is missing."""
    try:
        return build()
    except ImportError as error:
        print(f"{name}: left out ({error})", flush=True)
        return None


def row(work: str, turns: Mapping[str, Turns], ratio: str, goal: str, note: str = "", peer: str = "") -> Row:
    """A Row of the medians of the first and the last contestant. peer names the peer where it was left out."""
    names = list(turns)
    theirs, ours = (turns[names[0]] if len(names) > 1 else None), turns[names[-1]]
    return Row(work, peer or (names[0] if theirs else "missing"), theirs and theirs.median(), ours.median(), theirs and theirs.median_cpu(),
               ours.median_cpu(), ratio, goal, note)


def share(turns: Mapping[str, Turns]) -> str:
    """Our time over the peer's, for goals of the form `<= 0.5x`."""
    return f"{1 / _times_faster(turns):.3f}x" if len(turns) > 1 else ""


def speed(turns: Mapping[str, Turns]) -> str:
    """The peer's time over ours, for goals of the form `>= 10x`."""
    return f"{_times_faster(turns):.2f}x" if len(turns) > 1 else ""


def _times_faster(turns: Mapping[str, Turns]) -> float:
    names = list(turns)
    return turns[names[0]].median() / turns[names[-1]].median()


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
