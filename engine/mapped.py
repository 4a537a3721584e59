"""Tensors from files and to files without a copy on the way.

    weight = mapped(path, offset, torch.bfloat16, (4096, 4096))     # its bytes are mapped: no memory but the page cache's
    write_all(descriptor, [weight], offset)

The pages come as they are used, and the mapping ends with the last tensor that shares it. It is private: who writes into the tensor changes memory
and never the file. Small tensors are read, since a mapping costs a few system calls. What is written as it was mapped goes from file to file inside
the kernel, where the file system lets it, and its pages are never seen here: about half the work.
Left out: a file that somebody cuts short, or a disk that fails, while its tensors are in use, which ends the process (SIGBUS), as with every mapping (a
reader that hashes files before has found the disk out); numbers that were
changed through numpy, past torch's count of changes.
"""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SMALL = 1 << 18  # bytes
_MOST_PIECES = os.sysconf("SC_IOV_MAX")
_NOT_BETWEEN_FILES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype, _libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes, _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class _Source:
    """Where the bytes of a mapping lie: the file, known again by its inode, and the offset in it."""

    path: Path
    inode: tuple[int, int]
    offset: int


_sources: dict[int, _Source] = {}  # by the address of a mapping's first number, as long as the mapping lasts


def mapped(path: str | Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor [*shape] that begins `offset` bytes into a file. Raises OSError when the file ends before it does."""
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
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    pages = (ctypes.c_char * length).from_address(address)
    weakref.finalize(pages, _unmap, address, length, address + lead).atexit = False
    _libc.madvise(address, length, mmap.MADV_WILLNEED)
    status = os.fstat(descriptor)
    _sources[address + lead] = _Source(Path(path), (status.st_dev, status.st_ino), offset)
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=lead)
    return raw if raw.data_ptr() % 8 == 0 else raw.clone()


def _unmap(address: int, length: int, first: int) -> None:
    del _sources[first]  # before its address may be another's
    _libc.munmap(address, length)


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in a file."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def write_all(descriptor: int, pieces: Sequence[Tensor | memoryview], offset: int) -> None:
    """Write pieces behind one another at an offset of a file."""
    gathered: list[memoryview] = []
    for piece in pieces:
        if isinstance(piece, Tensor):
            num_copied = 0
            if piece.nbytes >= SMALL and (source := _source_of(piece)):
                offset = _write(descriptor, gathered, offset)
                gathered.clear()
                num_copied = _copy(source, piece, descriptor, offset)
                offset += num_copied
            piece = bytes_of(piece)[num_copied:] if num_copied < piece.nbytes else memoryview(b"")
        gathered.append(piece)
    _write(descriptor, gathered, offset)


def _source_of(tensor: Tensor) -> _Source | None:
    """The file that `tensor` was mapped from, if it has the file's bytes in the file's order still."""
    source = _sources.get(tensor.untyped_storage().data_ptr())
    if source is None or tensor.is_inference() or tensor._version or not tensor.is_contiguous():
        return None
    return source


def _copy(source: _Source, tensor: Tensor, descriptor: int, offset: int) -> int:
    """Copy the bytes of a mapped tensor from file to file; returns how many, fewer where the kernel or a file system declines."""
    begin, num_copied = source.offset + tensor.storage_offset() * tensor.element_size(), 0
    try:
        origin = os.open(source.path, os.O_RDONLY)
    except OSError:  # its name is gone, the mapping is not
        return 0
    try:
        status = os.fstat(origin)
        if (status.st_dev, status.st_ino) != source.inode:
            return 0
        while num_copied < tensor.nbytes:
            count = os.copy_file_range(origin, descriptor, tensor.nbytes - num_copied, begin + num_copied, offset + num_copied)
            if not count:
                raise OSError(errno.EIO, "the file was cut short", str(source.path))
            num_copied += count
    except OSError as error:
        if error.errno not in _NOT_BETWEEN_FILES:
            raise
    finally:
        os.close(origin)
    return num_copied


def _write(descriptor: int, pieces: Sequence[memoryview], offset: int) -> int:
    """Write pieces from memory; returns the offset behind them."""
    pieces = [piece for piece in pieces if piece]
    while pieces:
        count = os.pwritev(descriptor, pieces[:_MOST_PIECES], offset)
        offset += count
        while pieces and count >= len(pieces[0]):
            count -= len(pieces.pop(0))
        if count:
            pieces[0] = pieces[0][count:]
    return offset
