"""Corpora in object stores and on servers, through fsspec: s3://, gs://, http://, memory:// and whatever else it knows.

    corpus = open_remote("s3://bucket/web", "mmap", Path("/scratch/index_cache"))     # an IndexedCorpus

The .idx is copied to the cache folder whole. The .bin begins there as an empty (sparse) file of the full size; blocks of it are
fetched before they are read, several ranges at once, and stay for the next epoch, the next run and the other ranks of the machine.
Both are kept under a name that holds size and version of the remote files, so a corpus that was written anew never meets old blocks.
Each block is checked: the answer's length when it comes, its checksum when a process uses it first (a power cut leaves holes).

A request that fails is tried again with growing pauses; what fails for good is a DataError naming the address and the last answer.
Left out: throwing out blocks (the cache may grow to the corpora's size; delete the folder), and caches on network file systems.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.data.indexed import DataError, IndexedCorpus

BLOCK_BYTES = 1 << 20
RANGE_BYTES = 8 << 20  # neighbouring blocks are asked for together, up to this much
NUM_REQUESTS = 8  # at once, per process
NUM_TRIES = 6
FIRST_PAUSE_SECONDS = 0.25  # doubled after each try: 8 seconds in all
VERSION_FIELDS = ("ETag", "etag", "generation", "version_id", "VersionId", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")


class Address:
    """One remote file: its size and version when it was first looked at, and ranges of it for as long as these stay the same."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._pid = -1
        self._connect()
        self.size, self.version = self._look()

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end). Raises DataError when they cannot be had, or the file is not the one it was."""
        data = _retry(self.url, lambda: self._range(begin, end))
        if self._look() != (self.size, self.version):
            raise DataError(f"{self.url}: the file was written anew while it was in use; start again, and leave corpora alone while they are read")
        return data

    def _range(self, begin: int, end: int) -> bytes:
        if begin >= end:
            return b""
        data = self._connect().cat_file(self._path, start=begin, end=end)
        if len(data) != end - begin:
            hint = "; the server knows no ranges" if len(data) == self.size else ""
            raise OSError(f"bytes {begin} to {end} were asked for and {len(data)} bytes came{hint}")
        return data

    def _look(self) -> tuple[int, str]:
        info = _retry(self.url, self._info)
        if info.get("type") == "directory" or info.get("size") is None:
            raise DataError(f"{self.url}: the store tells no size, so it is no file that can be read by ranges; check the address")
        return int(info["size"]), json.dumps({name: str(info[name]) for name in VERSION_FIELDS if info.get(name)}, sort_keys=True)

    def _info(self) -> dict:
        filesystem = self._connect()
        filesystem.invalidate_cache()
        return filesystem.info(self._path)

    def _connect(self):
        if self._pid != os.getpid():  # connections and their thread do not survive a fork
            self._filesystem, self._path = _filesystem(self.url)
            self._pid = os.getpid()
        return self._filesystem


def _filesystem(url: str):
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {error}; install what this store needs, such as fsspec[http] or s3fs (pip install 'trireme-lm[data]' brings fsspec)") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}; give a prefix such as s3://bucket/web, or a local path") from None


def _retry(url: str, request):
    for attempt in range(NUM_TRIES):
        try:
            return request()
        except DataError:
            raise
        except Exception as error:  # each store has errors of its own
            if _is_final(error):
                raise DataError(f"{url}: cannot be read: {_tell(error)}; a corpus is two files, PREFIX.idx and PREFIX.bin: check the prefix and your rights") from None
            last = error
        if attempt + 1 < NUM_TRIES:
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise DataError(f"{url}: cannot be read, {NUM_TRIES} tries failed, the last with: {_tell(last)}; check the connection, then start again")


def _is_final(error: BaseException) -> bool:
    """Whether trying again is of no use: a missing file, missing rights, an answer 4xx other than "too slow" and "too many"."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    if type(error.__cause__).__module__.startswith("aiohttp"):
        return False  # fsspec's http answers FileNotFoundError to a question that never reached the server
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | NotImplementedError)


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(getattr(error, "status", None), int):
            return error.status
        error = error.__cause__
    return None


def _tell(error: BaseException) -> str:
    status, cause = _status(error), error.__cause__
    if status is None and cause is not None:  # fsspec's http says FileNotFoundError to everything
        return f"{type(error).__name__}: {error}, because of {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}" + (f" (status {status})" if status and str(status) not in str(error) else "")


class RemoteBlocks:
    """The local .bin of a remote one: a sparse file, and beside it for each block 0 or, once it is there, its checksum + 2^32.

    Processes of one machine may share both: a block is written before its checksum, and writing it twice does no harm.
    """

    _requests = None  # one pool per process; see _pool

    def __init__(self, address: Address, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self._address, self._block_bytes = address, block_bytes
        self._num_blocks = -(-address.size // block_bytes)
        _make_sparse(path, address.size)
        _make_sparse(path.with_suffix(".blocks"), 8 * self._num_blocks)
        self._path = path  # opened for each fetch: ten thousand of these hold no descriptors
        self._is_sound = np.zeros(self._num_blocks, dtype=bool)  # checked by this process
        self._begin_process()

    def _begin_process(self) -> None:
        self._coming: dict[int, Future] = {}
        self._lock, self._pid = threading.Lock(), os.getpid()

    def ensure(self, extents: np.ndarray) -> None:
        """Returns when the bytes of extents, int64 [n, 2] begins and ends, lie in the local file. Raises DataError."""
        for future in self.want(extents):
            future.result()

    def want(self, extents: np.ndarray) -> list[Future]:
        """Starts to fetch what is missing of extents; the futures of all that is under way."""
        blocks = self._blocks_of(extents)
        blocks = blocks[~self._is_sound[blocks]]
        if not blocks.size:
            return []
        if self._pid != os.getpid():  # a forked child has none of the threads that its parent's futures wait for
            self._begin_process()
        with self._lock:
            waiting = {self._coming[b] for b in blocks.tolist() if b in self._coming}
            for begin, end in _runs([b for b in blocks.tolist() if b not in self._coming], max(1, RANGE_BYTES // self._block_bytes)):
                future = self._pool().submit(self._fetch, begin, end)
                self._coming |= dict.fromkeys(range(begin, end), future)
                waiting.add(future)
        return list(waiting)

    def _blocks_of(self, extents: np.ndarray) -> np.ndarray:
        extents = extents[extents[:, 1] > extents[:, 0]]
        first, last = extents[:, 0] // self._block_bytes, (extents[:, 1] - 1) // self._block_bytes
        counts = last - first + 1
        return np.unique(np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))

    def _fetch(self, begin: int, end: int) -> None:
        try:
            with open(self._path, "r+b", buffering=0) as tokens, open(self._path.with_suffix(".blocks"), "r+b", buffering=0) as marks:
                missing = [b for b in range(begin, end) if not self._is_there(b, tokens, marks)]
                for first, stop in _runs(missing, end - begin):
                    data = self._address.read(first * self._block_bytes, min(stop * self._block_bytes, self._address.size))
                    _write(tokens, data, first * self._block_bytes)
                    parts = (data[i : i + self._block_bytes] for i in range(0, len(data), self._block_bytes))
                    _write(marks, np.array([_mark(part) for part in parts], dtype=np.uint64).tobytes(), 8 * first)
            self._is_sound[begin:end] = True
        except OSError as error:
            raise DataError(f"{self._path}: cannot keep {self._address.url}: {error.strerror}; make room, or choose another data.cache_dir") from None
        finally:
            with self._lock:
                for block in range(begin, end):
                    self._coming.pop(block, None)

    def _is_there(self, block: int, tokens, marks) -> bool:
        """Whether another run, or another process, has fetched it, and all of it reached the disk."""
        mark = int.from_bytes(os.pread(marks.fileno(), 8, 8 * block), sys.byteorder)
        size = min(self._block_bytes, self._address.size - block * self._block_bytes)
        return mark != 0 and mark == _mark(os.pread(tokens.fileno(), size, block * self._block_bytes))

    @staticmethod
    def _pool() -> ThreadPoolExecutor:
        if RemoteBlocks._requests is None or RemoteBlocks._requests[0] != os.getpid():
            RemoteBlocks._requests = os.getpid(), ThreadPoolExecutor(NUM_REQUESTS, "remote-blocks")
        return RemoteBlocks._requests[1]


def _write(file, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file.fileno(), data[done:], offset + done)


def _mark(data: bytes) -> int:
    return zlib.crc32(data) + 2**32


def _runs(numbers: list[int], longest: int) -> list[tuple[int, int]]:
    """Ascending numbers as stretches [begin, end) of at most `longest`."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number and number - runs[-1][0] < longest:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _make_sparse(path: Path, size: int) -> None:
    """An empty file of this size, unless it is there. Its name appears with its size, also when several processes make it."""
    if path.exists() and path.stat().st_size == size:
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        os.truncate(descriptor, size)
        try:
            os.link(temporary, path)  # unlike a rename it never takes the place of a file that another process made meanwhile
        except FileExistsError:
            pass
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def open_remote(prefix: str, storage: str, cache_dir: Path, block_bytes: int = BLOCK_BYTES) -> IndexedCorpus:
    """The corpus of a remote prefix; parts of it are kept in cache_dir/remote. Raises DataError."""
    for ending in (".idx", ".bin"):
        if prefix.endswith(ending):
            raise DataError(f"{prefix}: give the prefix without {ending}: {prefix.removesuffix(ending)}")
    index, tokens = Address(prefix + ".idx"), Address(prefix + ".bin")
    folder = cache_dir / "remote" / _folder_name(prefix, index, tokens, block_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_index(index, folder / "corpus.idx")
        blocks = RemoteBlocks(tokens, folder / "corpus.bin", block_bytes)
    except OSError as error:
        raise DataError(f"{folder}: cannot write the cache of {prefix}: {error.strerror}; choose a writable data.cache_dir with room") from None
    try:
        corpus = IndexedCorpus(folder / "corpus", storage, blocks)
    except DataError as error:
        raise DataError(f"{prefix}: {error}") from None
    corpus.prefix = prefix
    return corpus


def _folder_name(prefix: str, index: Address, tokens: Address, block_bytes: int) -> str:
    identity = [prefix, index.size, index.version, tokens.size, tokens.version, block_bytes]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", prefix)[-80:]
    return f"{readable}-{hashlib.md5(json.dumps(identity).encode(), usedforsecurity=False).hexdigest()[:16]}"


def _copy_index(index: Address, path: Path) -> None:
    if path.exists() and path.stat().st_size == index.size:
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for begin in range(0, index.size, RANGE_BYTES):
                file.write(index.read(begin, min(begin + RANGE_BYTES, index.size)))
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600, and the cache is shared
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
