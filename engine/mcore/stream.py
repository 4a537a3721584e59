"""A checkpoint's tensors one at a time, read and written by one process without process groups' help: what conversions use.

    write(folder, shards, tensors)          # (name, whole tensor) pairs in any order -> torch_dist files
    piece = read(folder, read_metadata(folder), key, offsets, sizes)

Memory is that of a few tensors, not of a model; what is read is a mapping of the file wherever the bytes lie there as they are wanted, and what is
written goes from where it lies to the file. The files are those that torch.distributed.checkpoint writes (its `.metadata`, its
`.distcp` files), so megatron's dist_checkpointing and torch's own tools read them as any other checkpoint.
Left out: optimizer state, and anything that is spread over ranks (checkpoint.py).
"""

import functools
import io
import math
import os
import pickle
import queue
import threading
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from engine.foreign import inside
from engine.mapped import mapped, write_all
from engine.rows import Rows, pieces, shape_of, whole

_no_checksums = threading.Lock()
ALIGNMENT = 64  # bytes: numbers lie in files as they may in memory, so that they can be mapped
QUEUE = 2  # tensors that wait for a writer: enough to keep it busy, little to keep in memory


@dataclass(frozen=True)
class Place:
    """Where a part of a named tensor lies: under `key`, at `offsets`; `part` cuts it out of the whole tensor."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    part: tuple[slice, ...]


def places(shards: Iterable[ShardedTensor], name_of: Callable[[str, list[int]], str]) -> dict[str, list[Place]]:
    """Whole tensor's name -> its places, from the shards that a network on one rank would save; name_of(key, counting axes)."""
    found = defaultdict(list)
    for shard in shards:
        lead = shard.prepend_axis_num  # axes that count layers and experts
        offsets = tuple(shard.global_offset)
        part = tuple(slice(o, o + n) for o, n in zip(offsets[lead:], shard.local_shape))
        found[name_of(shard.key, list(offsets[:lead]))].append(Place(shard.key, tuple(shard.global_shape), offsets, part))
    return {name: _in_one(parts) for name, parts in found.items()}


def _in_one(found: list[Place]) -> list[Place]:
    """One place instead of several that make a whole box of one stored tensor, as gate and up do where no rank keeps only half of them."""
    first, dims = found[0], range(len(found[0].part))
    lead = len(first.offsets) - len(first.part)
    ends = [(min(place.part[d].start for place in found), max(place.part[d].stop for place in found)) for d in dims]
    origins = {(place.key, place.offsets[:lead], tuple(o - s.start for o, s in zip(place.offsets[lead:], place.part))) for place in found}
    if len(origins) > 1 or math.prod(b - a for a, b in ends) != sum(math.prod(s.stop - s.start for s in place.part) for place in found):
        return found
    origin = next(iter(origins))[2]
    return [Place(first.key, first.global_shape, first.offsets[:lead] + tuple(o + a for o, (a, _) in zip(origin, ends)), tuple(slice(*end) for end in ends))]


def write(folder: Path, where: Mapping[str, list[Place]], tensors: Iterable[tuple[str, torch.Tensor | Rows]], num_threads: int = 2,
          written: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write every named tensor as `where` says, in `num_threads` files. `written` hears of bytes as they go to them.

    A tensor may come in pieces (rows.py), which are joined only where it goes to several places. Raises ValueError naming
    each tensor that is missing, unexpected or of another shape; the folder is then not a checkpoint.
    """
    waiting: queue.Queue = queue.Queue(QUEUE)
    writers = [_Writer(folder / f"__0_{i}.distcp", waiting, written) for i in range(num_threads)]
    problems, missing, stored = [], dict(where), {}
    try:
        for name, rows in tensors:
            found = missing.pop(name, None)
            if found is None:
                problems.append(f"unexpected {name}")
                continue
            shape = shape_of(rows)
            lead = len(found[0].global_shape) - len(shape)
            wanted = found[0].global_shape[lead:]
            if lead < 0 or shape != wanted:
                problems.append(f"{name} has shape {shape}, the model wants {wanted}")
                continue
            rows = pieces(rows)
            if len(found) > 1 or len({row.dtype for row in rows}) > 1:
                rows = (whole(rows),)
            for place in found:
                dtype, *rest = stored.get(place.key, (rows[0].dtype, place.global_shape, []))
                stored[place.key] = torch.promote_types(dtype, rows[0].dtype), *rest  # layers share a key, whose dtype rounds none of them
                rest[-1].append(place)
                _put(waiting, (place, rows if len(rows) > 1 else (rows[0][place.part],)), writers)
            del rows
            if any(writer.error is not None for writer in writers):
                break  # a full disk, say: no need to read what nobody will write
    finally:
        for _ in writers:
            _put(waiting, None, writers)
        for writer in writers:
            writer.join()
    for writer in writers:
        if writer.error is not None:
            raise writer.error
    problems += [f"missing {name}" for name in missing]
    if problems:
        raise ValueError("the tensors do not fit the model: " + "; ".join(sorted(problems)))
    _finish(folder, stored, [entry for writer in writers for entry in writer.entries])


def _put(waiting: queue.Queue, item, writers) -> None:
    """Hand an item to the writers; when all have failed nobody takes it, and there is nothing to wait for."""
    while any(writer.is_alive() for writer in writers):
        try:
            return waiting.put(item, timeout=1)
        except queue.Full:
            continue


class _Writer(threading.Thread):
    """Appends what it takes from a queue to one file, each as torch.save does, until it takes None."""

    def __init__(self, path: Path, waiting: queue.Queue, written: Callable[[int], None]):
        super().__init__(name=path.name, daemon=True)
        self.path, self.waiting, self.written = path, waiting, written
        self.entries: list[tuple[MetadataIndex, _StorageInfo]] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with open(self.path, "wb", buffering=0) as file:
                begin = 0
                while (item := self.waiting.get()) is not None:
                    place, rows = item
                    counting = [1] * (len(place.global_shape) - len(place.part))  # axes that count layers and experts
                    shape = (*counting, *(s.stop - s.start for s in place.part))
                    head, tail = around(shape, rows[0].dtype)
                    num_bytes = sum(row.nbytes for row in rows)
                    length = len(head) + num_bytes + len(tail)
                    begin += -begin % ALIGNMENT
                    os.posix_fallocate(file.fileno(), begin, length)  # a file that grows as it is written takes three times as long
                    write_all(file.fileno(), [memoryview(head), *rows, memoryview(tail)], begin)
                    self.entries.append((MetadataIndex(place.key, torch.Size(place.offsets)), _StorageInfo(self.path.name, begin, length)))
                    self.written(num_bytes)
                    begin += length
                    del item, rows  # not kept while waiting for the next
        except BaseException as error:
            self.error = error


@functools.lru_cache(256)
def around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the numbers of a tensor of this shape, with no checksum of them: whole files are hashed."""
    empty = torch.empty(shape, dtype=dtype)  # of memory that nobody touches
    file = _Around(empty)
    with _no_checksums:  # the setting is the process's, and several threads write
        checked = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(empty, file)
        finally:
            torch.serialization.set_crc32_options(checked)
    return bytes(file.before), bytes(file.after)


class _Around:
    """A file for torch.save that keeps all but the tensor's numbers, which it knows by their address."""

    def __init__(self, tensor: torch.Tensor):
        self.before, self.after, self._numbers = bytearray(), bytearray(), (tensor.data_ptr(), tensor.nbytes)
        self._seen = 0

    def write(self, piece: memoryview) -> int:
        begin, num_bytes = self._numbers
        if begin <= numpy.frombuffer(piece, numpy.uint8).ctypes.data < begin + num_bytes:
            self._seen += len(piece)
        else:
            (self.after if self._seen else self.before).extend(piece)
        return len(piece)

    def flush(self) -> None:
        assert self._seen == self._numbers[1], "torch.save did not write the numbers in one run"


def _finish(folder: Path, stored: Mapping[str, tuple], entries: list) -> None:
    """What makes a checkpoint of the files: torch's metadata, and megatron's two small files."""
    described = {}
    for key, (dtype, global_shape, found) in stored.items():
        chunks = [ChunkStorageMetadata(torch.Size(place.offsets), torch.Size([1] * (len(place.offsets) - len(place.part)) + [s.stop - s.start for s in place.part]))
                  for place in found]
        described[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(global_shape), chunks)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(described, None, dict(entries)), file)
    TorchCommonSaveStrategy("torch", 1).save_common({}, folder)
    save_config(CheckpointingConfig("torch_dist", 1, "torch", 1), str(folder))


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a folder, a pickle: one that names anything but descriptions of tensors is refused, so that a foreign one runs no code; and
    one whose tensors lie in files outside the folder."""
    with open(inside(folder, ".metadata"), "rb") as file:
        found = _Descriptions(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f".metadata holds a {type(found).__name__}, which describes no tensors")
    for name in {place.relative_path for place in found.storage_data.values()}:
        inside(folder, name)
    return found


class ForeignMetadata(pickle.UnpicklingError):
    """A `.metadata` that names what neither torch nor megatron writes into it; str() says what."""


class _Descriptions(pickle.Unpickler):
    """Unpickles what torch and megatron write into `.metadata`; raises ForeignMetadata for any other name."""

    ALLOWED = {
        "torch": ("Size", "device"),
        "torch.distributed.checkpoint.metadata": ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                                                  "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        "torch.serialization": ("_get_layout",),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
        "collections": ("OrderedDict", "defaultdict"),
        "builtins": ("set", "frozenset", "slice", "list", "dict", "tuple"),
        "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    }

    def find_class(self, module: str, name: str):
        if name in self.ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ForeignMetadata(f".metadata names {module}.{name}, which describes no tensors")


def read(folder: Path, metadata: Metadata, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """The box at `offsets` of the stored tensor `key`, [*sizes], from whichever files hold parts of it."""
    stored = metadata.state_dict_metadata[key]
    target, missing = None, math.prod(sizes)
    for chunk in stored.chunks:
        low = [max(o, c) for o, c in zip(offsets, chunk.offsets)]
        high = [min(o + n, c + m) for o, n, c, m in zip(offsets, sizes, chunk.offsets, chunk.sizes)]
        if any(a >= b for a, b in zip(low, high)):
            continue
        place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        held = _chunk(folder / place.relative_path, place, tuple(chunk.sizes))
        box = lambda base: tuple(slice(a - o, b - o) for a, b, o in zip(low, high, base))  # noqa: B023, E731
        part = held[box(chunk.offsets)]
        if part.shape == sizes and part.dtype == stored.properties.dtype:
            return part
        if target is None:
            target = torch.empty(sizes, dtype=stored.properties.dtype)
        target[box(offsets)] = part
        missing -= math.prod(b - a for a, b in zip(low, high))
    if missing:
        raise ValueError(f".metadata lists no file for {missing} numbers of {key}")
    return target


def _chunk(path: Path, place: _StorageInfo, shape: tuple[int, ...]) -> torch.Tensor:
    """One stored tensor: mapped where its bytes lie in order, as they do unless somebody saved a transposed one."""
    with open(path, "rb", buffering=0) as file:
        part = _Window(file, place.offset, place.length)
        described = torch.load(part, map_location="meta", weights_only=True)
        part.seek(0)
        with zipfile.ZipFile(part) as archive:
            record = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        if described.shape != shape:
            raise ValueError(f"{path.name} holds a tensor {list(described.shape)} where .metadata says {list(shape)}")
        if not described.is_contiguous() or record.compress_type != zipfile.ZIP_STORED or record.file_size != described.nbytes:
            part.seek(0)
            return torch.load(part, map_location="cpu", weights_only=True)
        file.seek(place.offset + record.header_offset)
        header = file.read(30)  # of a file in an archive: the lengths of its name and extra field lie at 26 and 28
        begin = file.tell() + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return mapped(path, begin, described.dtype, shape)


class _Window(io.RawIOBase):
    """The bytes [offset, offset + length) of a file, as a file."""

    def __init__(self, file, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        found = os.preadv(self._file.fileno(), [memoryview(buffer)[:wanted]], self._offset + self._at) if wanted else 0
        self._at += found
        return found
