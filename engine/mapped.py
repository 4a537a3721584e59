"""Tensors from files and to files without a copy on the way.

    weight = mapped(path, offset, torch.bfloat16, (4096, 4096))     # its bytes are mapped: no memory but the page cache's
    write_all(descriptor, [bytes_of(weight)], offset)

The pages come when the function is called, from disk if they must, and the mapping ends with the last tensor that shares it. It is private: who
writes into the tensor changes memory and never the file. Small tensors are read, since a mapping costs a few system calls.
Left out: a file that somebody cuts short while its tensors are in use, which ends the process (SIGBUS), as with every mapping.
"""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SMALL = 1 << 18  # bytes
_MOST_PIECES = os.sysconf("SC_IOV_MAX")
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python does not name yet

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype, _libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes, _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def mapped(path: str | Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor [*shape] that begins `offset` bytes into a file. Raises OSError when the file ends before it does, or cannot be read there."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size < offset + num_bytes:
            raise OSError(errno.EIO, "the file was cut short", str(path))
        raw = _map(descriptor, path, offset, num_bytes) if num_bytes >= SMALL else _read(descriptor, offset, num_bytes)
    finally:
        os.close(descriptor)
    return raw.view(dtype).view(shape)


def _read(descriptor: int, offset: int, num_bytes: int) -> Tensor:
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    os.preadv(descriptor, [memoryview(raw.numpy())], offset)
    return raw


def _map(descriptor: int, path: str | Path, offset: int, num_bytes: int) -> Tensor:
    """Not Python's mmap, which keeps a file open for every mapping: a model has more tensors than a process may have files."""
    lead = offset % mmap.ALLOCATIONGRANULARITY
    length = lead + num_bytes
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, offset - lead)
    if address == ctypes.c_void_p(-1).value:
        _raise(path)
    pages = (ctypes.c_char * length).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, length).atexit = False
    _libc.madvise(address, length, mmap.MADV_WILLNEED)
    if _libc.madvise(address, length, _POPULATE_READ) and ctypes.get_errno() != errno.EINVAL:  # an older kernel: pages come as they are used
        _raise(path)
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=lead)
    return raw if raw.data_ptr() % 8 == 0 else raw.clone()


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in a file."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def write_all(descriptor: int, pieces: Sequence[memoryview], offset: int) -> None:
    """Write pieces behind one another at an offset of a file."""
    pieces = [piece for piece in pieces if piece]
    while pieces:
        count = os.pwritev(descriptor, pieces[:_MOST_PIECES], offset)
        offset += count
        while pieces and count >= len(pieces[0]):
            count -= len(pieces.pop(0))
        if count:
            pieces[0] = pieces[0][count:]


def _raise(path: str | Path) -> None:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
