"""The processes of one node in one launch: started, shown, told, ended.

    ranks = Ranks(command, place, logs, lock.descriptor, console, shows_all=False)
    await ranks.start()
    while not ranks.are_all_reported:
        for rank in await ranks.changes(0.2): ...    # those that have just ended
    await ranks.end(seconds=0)                       # whatever is left, and all that they started

Each rank has a session of its own. Its output goes straight into logs/rank_00003.out and .err, and the supervisor reads it from there for the
console: a rank never waits for a slow one, and can still save when its supervisor was killed, where a broken pipe would end it.
The kernel sends a rank SIGTERM when its supervisor dies (Linux), and gives the supervisor what a dead rank has started.
"""

import asyncio
import contextlib
import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from engine.signals import end_with
from engine.supervise.console import STDERR, STDOUT, Console

CHILD_SUBREAPER = 36  # <linux/prctl.h>
DUMP_SECONDS = 1.0  # for a rank to write its stacks


@dataclass(frozen=True)
class Place:
    """Where a node stands in one launch."""

    launch: int
    node: int
    num_nodes: int
    first_rank: int
    num_local: int
    world_size: int
    address: str
    port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """torchrun's variables for a rank."""
        threads = {} if self.num_local == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}  # as torchrun does
        return threads | {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_local),
            "GROUP_RANK": str(self.node),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_RESTART_COUNT": str(self.launch - 1),
        }


class Rank:
    """One process. `code` is None while it runs, and negative for a signal."""

    def __init__(self, number: int, process: asyncio.subprocess.Process):
        self.number, self.process, self.started, self.seconds = number, process, asyncio.get_running_loop().time(), 0.0
        self.end = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        await self.process.wait()
        self.seconds = asyncio.get_running_loop().time() - self.started

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def __str__(self) -> str:
        return f"rank {self.number} {words(self.code)}"


def words(code: int | None) -> str:
    if code is None:
        return "runs"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


class Ranks:
    """All ranks of this node."""

    def __init__(self, command: Sequence[str], place: Place, logs: Path, lock: int, console: Console, shows_all: bool):
        self._command, self.place, self._logs, self._lock, self._console, self._shows_all = command, place, logs, lock, console, shows_all
        self.all: list[Rank] = []
        self._reported: set[int] = set()
        self._tails: list[Tail] = []

    async def start(self) -> None:
        """Start every rank."""
        adopt_orphans()
        for local_rank in range(self.place.num_local):
            number = self.place.first_rank + local_rank
            out, err = (self._open(number, suffix) for suffix in ("out", "err"))
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, pass_fds=(self._lock,),
                    env=os.environ | self.place.environment(local_rank), preexec_fn=end_with(os.getpid()))
            finally:
                os.close(out)
                os.close(err)
            self.all.append(Rank(number, process))

    def _open(self, number: int, suffix: str) -> int:
        """A log of a rank, with a line that says where this launch begins; what a person is to see of it is followed from there."""
        path = self._logs / f"rank_{number:05d}.{suffix}"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(file, f"== {now} launch {self.place.launch}, node {self.place.node}, rank {number} of {self.place.world_size}\n".encode())
        if suffix == "err" or self._shows_all or number == 0:
            show = partial(self._console.say, STDOUT if suffix == "out" else STDERR)
            self._tails.append(Tail(path, f"[{self.place.node}:{number}] ", show))
        return file

    @property
    def running(self) -> list[Rank]:
        return [rank for rank in self.all if rank.code is None]

    @property
    def are_all_reported(self) -> bool:
        """Has `changes` reported the end of every rank?"""
        return len(self._reported) == len(self.all)

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self.all]

    async def changes(self, seconds: float) -> list[Rank]:
        """Show new output; the ranks that have ended since this was last asked, waiting at most so long for the first."""
        pending = [rank for rank in self.all if rank.number not in self._reported]
        await asyncio.wait([rank.end for rank in pending], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        self._show()
        ended = [rank for rank in pending if rank.end.done()]
        self._reported |= {rank.number for rank in ended}
        return sorted(ended, key=lambda rank: rank.seconds)

    def signal(self, what: int) -> None:
        """To every rank that runs."""
        for rank in self.running:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(what)

    async def kill(self) -> None:
        """End the ranks that run: they dump their stacks (engine/signals.py answers SIGUSR2), then the kernel ends them."""
        self.signal(signal.SIGUSR2)
        if self.running:
            await asyncio.wait([rank.end for rank in self.running], timeout=DUMP_SECONDS)
        self.signal(signal.SIGKILL)
        await asyncio.gather(*(rank.end for rank in self.all))

    async def end(self, seconds: float) -> None:
        """Leave nothing behind: ranks that run are killed, and what ranks have started has `seconds` to leave by itself."""
        if self.running:
            await self.kill()
        deadline = asyncio.get_running_loop().time() + seconds
        while orphans() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        for rank in self.all:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        while found := orphans():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            await asyncio.sleep(0.01)
        self._show()
        for tail in self._tails:
            tail.close()

    def _show(self) -> None:
        for tail in self._tails:
            tail.show()


class Tail:
    """What is written to a file from now on, handed to show(text) in whole lines, each with a prefix."""

    def __init__(self, path: Path, prefix: str, show: Callable[[str], None]):
        self._file, self._prefix, self._show, self._part = open(path, "rb"), prefix, show, b""
        self._file.seek(0, os.SEEK_END)

    def show(self) -> None:
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        self._print(lines)

    def close(self) -> None:
        self._print([self._part] if self._part else [])
        self._file.close()

    def _print(self, lines: list[bytes]) -> None:
        if lines:
            self._show("".join(f"{self._prefix}{line.decode(errors='replace')}\n" for line in lines))


def adopt_orphans() -> None:
    """Make this process the parent of what its dead children have started, so that it can be ended (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1)


def orphans() -> list[psutil.Process]:
    """What lives below this process when all its ranks have ended. Those that have ended as well are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return psutil.Process().children(recursive=True)
