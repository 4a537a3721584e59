"""Host memory that batches are read into: a pool of buffers, each used again once nothing refers to what it held.

    pool = Pool("plain")                                                # or pinned, or shared
    block = pool.block({"text": ((8, 257), torch.int64)})               # tensors, side by side in one buffer
    block.fields["text"]                                                # [8, 257], to be written

A tensor cut out of a block holds its buffer, as does every view and slice of that tensor, whoever keeps it and for how long: the buffer
goes back to the pool when the last of them is gone. So no reader has to say that it is done, and one that keeps a batch for ever costs
memory, never a wrong number: the pool makes another buffer. In a loop that lets batches go there are as many as are read ahead, and two.
pinned: memory a GPU copies from by itself. shared: memory that another process of this machine maps by the name in `where`.
Left out: bounding how far ahead anything is read (loader.py's Prefetcher).
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

_serials = itertools.count()
ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Where:
    """A shared buffer as another process of the same machine and user finds it."""

    pid: int
    fd: int
    num_bytes: int
    serial: int
    """Of a process's buffers: a number that `fd` alone is not, since those come again."""

    def map(self) -> np.ndarray:
        """The buffer, uint8 [num_bytes]; its owner must hold it open now, and need not later."""
        with open(f"/proc/{self.pid}/fd/{self.fd}", "r+b", buffering=0) as file:
            return np.frombuffer(mmap.mmap(file.fileno(), self.num_bytes), dtype=np.uint8)


@dataclass(frozen=True)
class Block:
    """Tensors that lie one after the other in one buffer. flat: uint8, all of them; where: of a shared buffer."""

    fields: dict[str, torch.Tensor]
    flat: torch.Tensor
    where: Where | None = None


class Pool:
    """Buffers of one kind. May be used by several threads."""

    def __init__(self, kind: Literal["plain", "pinned", "shared"] = "plain") -> None:
        self.kind = kind
        self.num_made = 0
        self._free: list[tuple[np.ndarray, Where | None]] = []
        self._lock = threading.RLock()  # re-entrant: garbage is collected, and a buffer returned, at any moment
        self._gpu = torch.cuda.current_device() if kind == "pinned" else None  # a thread begins on GPU 0, whichever its rank's is

    def block(self, shapes: Shapes) -> Block:
        """Tensors of these shapes, their content undefined."""
        starts, end = [], 0
        for shape, dtype in shapes.values():
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        flat, where = self._lend(end)
        fields = {name: flat[start:start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                  for start, (name, (shape, dtype)) in zip(starts, shapes.items())}
        return Block(fields, flat, where)

    def _lend(self, num_bytes: int) -> tuple[torch.Tensor, Where | None]:
        with self._lock:
            fitting = [i for i, (buffer, _) in enumerate(self._free) if buffer.size >= num_bytes]
            if fitting:
                owner, where = self._free.pop(min(fitting, key=lambda i: self._free[i][0].size))
            else:
                if self._free:
                    self._free.pop()  # too small for what batches have become
                owner, where = self._make(max(num_bytes, ALIGNMENT))
                self.num_made += 1
        # A view of its own for every use: torch keeps it alive while any tensor looks at this memory, and its end is the buffer's return.
        lease = owner[:num_bytes]
        weakref.finalize(lease, self._take_back, owner, where).atexit = False
        return torch.from_numpy(lease), where

    def _take_back(self, owner: np.ndarray, where: Where | None) -> None:
        with self._lock:
            self._free.append((owner, where))

    def _make(self, num_bytes: int) -> tuple[np.ndarray, Where | None]:
        if self.kind == "pinned":
            with torch.cuda.device(self._gpu):
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy(), None
        if self.kind == "shared":
            # Without a name in any folder: nothing is left behind by a process that is killed, and /dev/shm may be small.
            fd = os.memfd_create("trireme-batches", os.MFD_CLOEXEC)
            os.ftruncate(fd, num_bytes)
            owner = np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8)
            weakref.finalize(owner, os.close, fd).atexit = False
            return owner, Where(os.getpid(), fd, num_bytes, next(_serials))
        return torch.empty(num_bytes, dtype=torch.uint8).numpy(), None  # aligned, which numpy leaves to chance


def shapes_of(batch: dict[str, torch.Tensor]) -> Shapes:
    """What `Pool.block` wants to know to hold a batch."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
