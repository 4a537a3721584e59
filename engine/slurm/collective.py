"""Every rank says what it found on its node; rank 0 collects, compares the clocks, and lets all of them add up a tensor.

    bad = compare(problems, run, node, nodes)          # on every rank: {node: [what is wrong]}, the same everywhere

A rank that does not answer in time is named, with its node. Raises Unreachable on a rank that does not reach rank 0. The sum goes over gloo and,
on GPUs, over NCCL too, so it meets the network that training will use.
"""

import datetime
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

NUM_ELEMENTS = 1 << 20


class Unreachable(Exception):
    """Rank 0 was not found, or has gone."""


def compare(problems: list[str], run, node: str, nodes: list[str], now: Callable[[], float] = time.time) -> dict[str, list[str]]:
    """Problems of every node. Collective over RANK and WORLD_SIZE. nodes: that of every rank, by rank, for those that never answer; now: the clock."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    seconds = run.slurm.check.timeout_seconds
    try:
        store = dist.TCPStore(host, port, world, rank == 0, datetime.timedelta(seconds=seconds), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise Unreachable(f"cannot reach rank 0 at {host}:{port} in {seconds:g} s: {str(error).splitlines()[0]}") from None
    talk = Talk(store, rank, nodes, seconds)
    bad = talk.round("node", json.dumps({"node": node, "problems": problems}), talk.reports)
    if not bad:     # the verdict of a round is also the moment at which all look at their clocks
        bad = talk.round("clock", str(now()), lambda said: talk.clocks(said, run.slurm.check.max_clock_seconds))
    if not bad:
        bad = talk.round("sum", _sum_problem(store, rank, world, seconds, bool(run.slurm.gpus_per_node)), talk.sums)
    talk.leave()
    return bad


class Talk:
    """Rounds of questions in the store of rank 0: every rank answers, rank 0 judges, every rank learns the verdict."""

    def __init__(self, store, rank: int, nodes: list[str], seconds: float):
        self.store, self.rank, self.nodes, self.seconds = store, rank, list(nodes), seconds
        self.bad: dict[str, list[str]] = {}

    def round(self, name: str, answer: str, judge: Callable[[dict[int, str]], None]) -> dict[str, list[str]]:
        """All that is bad so far. judge: on rank 0, with the answers by rank."""
        self.store.set(f"{name}/{self.rank}", answer)
        if self.rank == 0:
            judge(self._answers(name, 2 * self.seconds if name == "sum" else self.seconds))     # a collective that fails takes the time once itself
            self.store.set(name, json.dumps(self.bad))
        try:
            self.store.wait([name], datetime.timedelta(seconds=3 * self.seconds))
        except RuntimeError:
            raise Unreachable(f"rank 0 on {self.nodes[0]} has stopped answering ({name})") from None
        return json.loads(self.store.get(name))

    def leave(self) -> None:
        """Rank 0 holds the store, so it goes last."""
        self.store.set(f"bye/{self.rank}", "")
        if self.rank == 0:
            self._answers("bye", min(10, self.seconds))

    def _answers(self, name: str, seconds: float) -> dict[int, str]:
        deadline, found = time.monotonic() + seconds, {}
        for rank in range(len(self.nodes)):
            try:
                self.store.wait([f"{name}/{rank}"], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
            except RuntimeError:
                self._blame(rank, f"rank {rank} has not answered in {seconds:g} s ({name}; slurm.check.timeout_seconds)")
            else:
                found[rank] = self.store.get(f"{name}/{rank}").decode()
        return found

    def reports(self, said: dict[int, str]) -> None:
        for rank, report in ((rank, json.loads(text)) for rank, text in said.items()):
            self.nodes[rank] = report["node"]
            for problem in report["problems"]:
                self._blame(rank, problem)

    def clocks(self, said: dict[int, str], max_seconds: float) -> None:
        for rank, clock in said.items():
            ahead = float(clock) - float(said[0])
            if abs(ahead) > max_seconds:
                side = "ahead of" if ahead > 0 else "behind"
                self._blame(rank, f"its clock is {abs(ahead):.1f} s {side} that of {self.nodes[0]} (slurm.check.max_clock_seconds)")

    def sums(self, said: dict[int, str]) -> None:
        for rank, problem in said.items():
            if problem:
                self._blame(rank, problem)

    def _blame(self, rank: int, problem: str) -> None:
        told = self.bad.setdefault(self.nodes[rank], [])
        if problem not in told:
            told.append(problem)


def _sum_problem(store, rank: int, world: int, seconds: float, on_gpu: bool) -> str:
    """Empty when the sum over all ranks comes out right on every way there is."""
    for backend in ("gloo", "nccl") if on_gpu else ("gloo",):
        try:
            device = f"cuda:{int(os.environ['LOCAL_RANK'])}" if backend == "nccl" else "cpu"
            if backend == "nccl":
                torch.cuda.set_device(device)
            dist.init_process_group(backend, store=dist.PrefixStore(backend, store), rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds))
            numbers = torch.full((NUM_ELEMENTS,), float(1 + rank % 2), device=device)
            dist.all_reduce(numbers)
            wrong = int((numbers != world + world // 2).sum())
            dist.destroy_process_group()
        except RuntimeError as error:
            return f"the {backend} collective failed: {str(error).splitlines()[0]}"
        if wrong:
            return f"{wrong} of {NUM_ELEMENTS} sums of the {backend} collective are wrong"
    return ""
