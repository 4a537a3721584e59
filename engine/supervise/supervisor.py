"""READ FIRST: the one loop of launch/supervise.py. Gather the nodes, start the ranks, watch them, judge how they ended, wait, again.

    code = supervise(options(doc))

What ends a launch: all ranks have left; a rank failed, here or on another node, and the others have had --grace-seconds to say what they
saw (they cannot save without it); SIGTERM, SIGUSR1, SIGINT or SIGHUP, on which the ranks save and leave. Node 0 judges, by restarts.py.
Left out: looking into a rank. That one hangs is found by the ranks themselves (engine/watch.py), who then leave with a failure.
"""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.supervise.console import Console
from engine.supervise.folder import Events, Lock, UsageError, run_dir, steps_taken
from engine.supervise.nodes import Alone, Lost, Nodes, NodesError
from engine.supervise.ranks import Place, Ranks
from engine.supervise.restarts import ERROR, OK, REQUEUE, USAGE, Restarts, Verdict, judge

POLL_SECONDS = 0.2  # between looks at the ranks' output; their ends are events
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(args: argparse.Namespace) -> int:
    """Supervise a run as options.py has read it from the command line. Returns the exit code."""
    try:
        folder = run_dir(args.arguments)
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Console()) as console:
            events = Events(logs, console, args.node_rank, args.nnodes)
            with Lock(logs, args.node_rank, events) as lock:
                return asyncio.run(Supervisor(args, folder, console, events, lock).run())
    except (UsageError, NodesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR


@dataclass(frozen=True)
class Outcome:
    """How a launch ended on one node. codes: of its ranks; told: signals that were handed to them; step: how far the run is."""

    codes: list[int]
    told: list[int]
    step: int
    first: str  # the first failure, for a person


class Stopped(Exception):
    """Somebody has asked the supervisor to end while nothing ran."""


class Supervisor:
    """A run on this node, from the first launch to the last."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console, events: Events, lock: Lock):
        self.args, self.folder, self.console, self.events, self.lock = args, folder, console, events, lock
        self.nodes = Nodes(args.node_rank, args.nnodes, args.address, args.join_seconds) if args.nnodes > 1 else Alone()
        self.stop = self.nodes.heard["stop"]  # somebody has asked a supervisor of this run to end
        self.ranks: Ranks | None = None  # of the launch underway, while any runs
        self.told: set[int] = set()  # signals that were handed to them
        self.num_launches = 0

    async def run(self) -> int:
        """The loop. Returns the exit code."""
        args = self.args
        self._listen()
        try:
            await self._unless_stopped(self.lock.take(args.stop_seconds))
            restarts = Restarts(args.max_restarts, args.backoff_seconds, args.longest_backoff_seconds, args.requeue_here, steps_taken(self.folder))
            while True:
                place = await self._unless_stopped(self._meet())
                outcome = await self._launch(place)
                try:
                    verdict = await self._judged(outcome, restarts)
                except Lost:
                    verdict = Verdict(True, ERROR, 0.0, "node 0 was lost; waiting for it")
                self.events.write("verdict", verdict.reason, launch=self.num_launches, step=outcome.step, **asdict(verdict))
                if not verdict.relaunch:
                    return verdict.code
                await self._unless_stopped(asyncio.sleep(verdict.delay))
        except Stopped:
            self.events.write("stopped", "stopped while no rank ran; the same command goes on from the newest checkpoint")
            return REQUEUE
        finally:
            await self.nodes.close()

    # --- the parts of the loop, in the order in which it calls them -----------------------------------------------------

    def _listen(self) -> None:
        """Signals become calls of this loop."""
        loop = asyncio.get_running_loop()
        for number in (*STOPS, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        """Hand it to the ranks. SIGINT a second time ends them at once."""
        impatient = number == signal.SIGINT and self.stop.is_set()
        if number != signal.SIGUSR1 or not self.args.requeue_here:
            self.stop.set()
            self.nodes.call("stop")
        if impatient and self.ranks:
            self.ranks.signal(signal.SIGKILL)
        else:
            self._tell(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
        self.events.write("signal", f"{signal.Signals(number).name}; the ranks are {'ended' if impatient else 'to save and leave'}", signal=number)

    def _tell(self, number: int) -> None:
        if self.ranks:
            self.told.add(number)
            self.ranks.signal(number)

    async def _unless_stopped(self, work):
        """The result of `work`. Raises Stopped as soon as somebody asks the supervisor to end."""
        work, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise Stopped
            return work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _meet(self) -> Place:
        """Wait for all nodes; where this one stands among them."""
        args = self.args
        if args.nnodes > 1:
            self.events.write("join", f"waiting for {args.nnodes} nodes at {args.master}")
        values = await self.nodes.gather("start", {"num_local": args.nproc_per_node, "port": _free_port() if args.node_rank == 0 else None,
                                                   "launch": self.num_launches})
        counts = [value["num_local"] for value in values]
        self.num_launches = max(value["launch"] for value in values) + 1
        return Place(launch=self.num_launches, node=args.node_rank, num_nodes=args.nnodes, first_rank=sum(counts[:args.node_rank]),
                     num_local=args.nproc_per_node, world_size=sum(counts), address=args.address[0] if args.address else "127.0.0.1",
                     port=values[0]["port"])

    async def _launch(self, place: Place) -> Outcome:
        """Start the ranks and watch them until none runs."""
        self.told = set()
        command = [sys.executable, self.args.program, *self.args.arguments]
        self.ranks = ranks = Ranks(command, place, self.folder / "logs", self.lock.descriptor, self.console, self.args.output == "all")
        try:
            await ranks.start()
            self.lock.describe(ranks.pids)
            self.events.write("launch", f"launch {self.num_launches}: {place.num_local} of {place.world_size} ranks started, output in {self.folder / 'logs'}",
                              launch=self.num_launches, world_size=place.world_size, pids=ranks.pids, address=place.address, port=place.port)
            if self.stop.is_set():  # while they were started
                self._tell(signal.SIGTERM)
            first = await self._watch(ranks)
        finally:
            self.ranks = None
            is_clean = all(rank.code in (OK, REQUEUE) for rank in ranks.all)
            await ranks.end(self.args.grace_seconds if is_clean else 0)
        return Outcome([rank.code for rank in ranks.all], sorted(self.told), steps_taken(self.folder), first)

    async def _watch(self, ranks: Ranks) -> str:
        """Until no rank runs. Returns the first failure, in words."""
        first, limit = "", Limit()
        while not ranks.are_all_reported:
            for rank in await ranks.changes(POLL_SECONDS):
                self.events.write("exit", f"{rank} after {rank.seconds:.1f} s", launch=self.num_launches, rank=rank.number, code=rank.code,
                                  seconds=round(rank.seconds, 3))
                if rank.code == REQUEUE:
                    limit.within(self.args.stop_seconds, "the others were to save too")
                elif rank.code != OK:
                    limit.within(self.args.grace_seconds, "they cannot go on without it")
                    self.nodes.call("failed")
                    first = first or str(rank)
            if self.nodes.heard["failed"].is_set():
                limit.within(self.args.grace_seconds, "a rank of another node has failed")
            if self.nodes.heard["lost"].is_set() or self.stop.is_set():
                if not self.told:
                    self._tell(signal.SIGTERM)
                limit.within(self.args.stop_seconds, "they were to save and leave")
            if limit.is_over() and ranks.running:
                numbers = ", ".join(str(rank.number) for rank in ranks.running)
                self.events.write("kill", f"ending rank {numbers}: {limit.reason}, and {limit.seconds:g} s have passed", launch=self.num_launches)
                await ranks.kill()
        return first

    async def _judged(self, outcome: Outcome, restarts: Restarts) -> Verdict:
        """Node 0's verdict on how the launch ended on all nodes. Raises Lost."""
        outcomes = await self.nodes.gather("outcome", asdict(outcome))
        verdict = asdict(self._judge(outcomes, restarts)) if self.args.node_rank == 0 else None
        return Verdict(**(await self.nodes.gather("verdict", verdict))[0])

    def _judge(self, outcomes: list[dict | None], restarts: Restarts) -> Verdict:
        here = [outcome for outcome in outcomes if outcome]
        codes = [code for outcome in here for code in outcome["codes"]] + [None] * (len(outcomes) - len(here))
        told = {number for outcome in here for number in outcome["told"]}
        # Asked to end only when the ranks had ended of something else: then it is as if it had waited already.
        verdict = restarts.after(judge(codes, told), outcomes[0]["step"], is_stopping=bool(told) and self.stop.is_set())
        causes = [outcome["first"] if outcome else f"node {node} was lost" for node, outcome in enumerate(outcomes)]
        cause = next(filter(None, causes), "")
        return replace(verdict, reason=f"{cause}; {verdict.reason}") if cause and verdict.code == ERROR else verdict


@dataclass
class Limit:
    """The earliest of several times by which something must have ended."""

    at: float = float("inf")
    seconds: float = 0.0
    reason: str = ""

    def within(self, seconds: float, reason: str) -> None:
        at = asyncio.get_running_loop().time() + seconds
        if at < self.at:
            self.at, self.seconds, self.reason = at, seconds, reason

    def is_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self.at


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as wire:
        wire.bind(("", 0))
        return wire.getsockname()[1]
