"""The ranks that work on the same batches: the first of them reads, the others are told. For data.read_on=first_rank.

    replica = Replica(place, minutes=30, to_ends=True, in_memory=False)      # collective over all ranks
    sizes = replica.told(lambda: len(open_corpora()))                        # what the first rank found, on every rank of the replica
    block = replica.ahead.share(read, pool)                                  # a Block (buffers.py): read() on the first rank, received elsewhere

A replica is the tp x pp x cp ranks of one data-parallel rank. It speaks over gloo groups of its own, in host memory, also where the
network trains over NCCL; so a thread that reads ahead never meets the collectives of the training thread. Each `Line` is one order of
batches, the same on every rank: `ahead` for the thread, `now` for whoever asks in the training thread. An error of the reader is raised
on every rank of the replica, in the same words.
in_memory: batches pass through shared memory instead of sockets, for replicas whose ranks are on one machine.
Left out: one reader for several replicas (each reads other samples), and what a rank does with a batch.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from engine.config import ConfigError
from engine.data.buffers import Block, Pool, Where, shapes_of
from engine.data.indexed import DataError

MAX_MAPPED = 16  # buffers of the reader that a rank keeps in its address space


class Replica:
    """This rank's replica. place: engine/mcore/topology.py's. to_ends: what only the first and the last pp rank need goes to those alone.

    Raises ConfigError, on every rank, where in_memory is asked for and a replica spreads over machines.
    """

    def __init__(self, place, minutes: float, to_ends: bool, in_memory: bool) -> None:
        ranks: list = [None] * place.world_size
        dist.all_gather_object(ranks, (place.dp_rank, place.pp_rank, _machine()))
        replicas = [[rank for rank, (dp_rank, _, _) in enumerate(ranks) if dp_rank == replica] for replica in range(place.dp)]
        if in_memory:
            _refuse_several_machines(replicas, [machine for _, _, machine in ranks])
        timeout = datetime.timedelta(minutes=minutes)
        self._groups = []

        def group_of(parts: list[list[int]]):
            """This rank's group where each of `parts` makes one; None outside them. Collective over all ranks."""
            groups = [dist.new_group(part, timeout, backend="gloo") for part in parts]
            self._groups += [group for part, group in zip(parts, groups) if place.rank in part]
            return next((group for part, group in zip(parts, groups) if place.rank in part), None)

        def line() -> Line:
            whole = group_of(replicas)
            return Line(replicas[place.dp_rank][0], whole, group_of(ends) if has_middle else whole, in_memory)

        ends = [[rank for rank in replica if ranks[rank][1] in (0, place.pp - 1)] for replica in replicas]
        has_middle = to_ends and place.pp > 2
        self.ahead, self.now = line(), line()

    @property
    def is_reader(self) -> bool:
        return self.now.is_reader

    @property
    def num_bytes_received(self) -> int:
        """Of batches, on this rank."""
        return self.ahead.num_bytes_received + self.now.num_bytes_received

    def told(self, find: Callable):
        """What find() returns on the first rank, on every rank; its error on every rank."""
        return self.now.told(find)

    def close(self) -> None:
        """Leave the groups. Collective over the replica."""
        for group in self._groups:
            dist.destroy_process_group(group)


class Line:
    """One order of batches, from the first rank of a replica to the others. `ends`: the group of those that need everything, None on others."""

    def __init__(self, reader: int, whole, ends, in_memory: bool) -> None:
        self.reader, self.whole, self.ends, self.in_memory = reader, whole, ends, in_memory
        self.is_reader = dist.get_rank() == reader
        self.num_bytes_received = 0
        self._mapped: dict[Where, np.ndarray] = {}

    def told(self, find: Callable):
        """What find() returns on the reader, on every rank; an error of it on every rank."""
        found = [_outcome(find) if self.is_reader else None]
        dist.broadcast_object_list(found, src=self.reader, group=self.whole)
        value, error = found[0]
        if error is not None:
            raise _raised(*error)
        return value

    def share(self, read: Callable[[], Block], pool: Pool, sent: str = "", only_to_ends: bool = False) -> Block:
        """The block that read() fills on the reader, on every rank. sent: the one field that is passed on, the first; empty: all of them.
        only_to_ends: ranks in the middle of the pipeline get zeros for it."""
        block = None

        def describe():
            nonlocal block
            block = read()
            return shapes_of(block.fields), block.where

        shapes, where = self.told(describe)
        if not self.is_reader:
            block = pool.block(shapes)
        first = block.fields[sent].nbytes if sent else len(block.flat)
        self._pass(block.flat[:first], where, self.ends if only_to_ends else self.whole)
        return block

    def _pass(self, flat: torch.Tensor, where: Where | None, group) -> None:
        if group is None:
            flat.zero_()
        elif not self.in_memory:
            dist.broadcast(flat, src=self.reader, group=group)
        elif not self.is_reader:
            flat.copy_(torch.from_numpy(self._at(where)[:len(flat)]))
        if group is not None and not self.is_reader:
            self.num_bytes_received += len(flat)
        if self.in_memory:
            dist.barrier(self.whole)  # every rank has copied; from here on the reader's buffer may be used again

    def _at(self, where: Where) -> np.ndarray:
        if where not in self._mapped:
            if len(self._mapped) == MAX_MAPPED:
                del self._mapped[next(iter(self._mapped))]  # the oldest, perhaps of a buffer that its owner has let go
            self._mapped[where] = where.map()
        return self._mapped[where]


def _refuse_several_machines(replicas: list[list[int]], machines: list) -> None:
    for number, members in enumerate(replicas):
        if len({machines[rank] for rank in members}) > 1:
            raise ConfigError([f"data.buffer=shared passes batches through the memory of one machine, but the tp * pp * cp ranks of replica "
                               f"{number} are on several; set data.buffer=auto"])


def _machine() -> tuple[str, str]:
    """Equal for two processes that may look into each other's memory by process id."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip(), os.readlink("/proc/self/ns/pid")


def _outcome(find: Callable) -> tuple:
    """(what find() returns, None), or (None, what _raised makes an error of)."""
    try:
        return find(), None
    except ConfigError as error:
        return None, ("ConfigError", error.problems)
    except (ValueError, OSError) as error:  # a person's to mend
        return None, ("DataError", str(error))
    except Exception:
        return None, ("", traceback.format_exc())


def _raised(kind: str, what) -> Exception:
    return {"ConfigError": ConfigError, "DataError": DataError}.get(kind, RuntimeError)(what)
