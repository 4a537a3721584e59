"""A checkpoint's tensors one at a time, read and written by one process without process groups' help: what conversions use.

    write(folder, shards, tensors)          # (name, whole tensor) pairs in any order -> torch_dist files
    piece = read(folder, metadata, key, offsets, sizes)

Memory is that of a few tensors, not of a model. The files are those that torch.distributed.checkpoint writes (its `.metadata`, its
`.distcp` files), so megatron's dist_checkpointing and torch's own tools read them as any other checkpoint.
Left out: optimizer state, and anything that is spread over ranks (checkpoint.py).
"""

import pickle
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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
    return dict(found)


def write(folder: Path, where: Mapping[str, list[Place]], tensors: Iterable[tuple[str, torch.Tensor]], num_threads: int = 2,
          written: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write every named tensor as `where` says, in `num_threads` files. `written` hears of bytes as they go to disk.

    Raises ValueError naming each tensor that is missing, unexpected or of another shape; the folder is then not a checkpoint.
    """
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # a third of the time; whole files are hashed where that is wanted
    waiting: queue.Queue = queue.Queue(QUEUE)
    writers = [_Writer(folder / f"__0_{i}.distcp", waiting, written) for i in range(num_threads)]
    problems, missing, stored = [], dict(where), {}
    try:
        for name, tensor in tensors:
            found = missing.pop(name, None)
            if found is None:
                problems.append(f"unexpected {name}")
                continue
            lead = len(found[0].global_shape) - tensor.dim()
            wanted = found[0].global_shape[lead:]
            if lead < 0 or tuple(tensor.shape) != wanted:
                problems.append(f"{name} has shape {tuple(tensor.shape)}, the model wants {wanted}")
                continue
            for place in found:
                stored.setdefault(place.key, (tensor.dtype, place.global_shape, []))[2].append(place)
                _put(waiting, (place, tensor[place.part]), writers)
            del tensor
    finally:
        for _ in writers:
            _put(waiting, None, writers)
        for writer in writers:
            writer.join()
        torch.serialization.set_crc32_options(checked)
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
                while (item := self.waiting.get()) is not None:
                    place, tensor = item
                    begin = file.tell()
                    # Counting axes have size 1 here; a copy of its own, for torch.save would write all of a view's storage.
                    tensor = tensor.reshape([1] * (len(place.global_shape) - tensor.dim()) + list(tensor.shape))
                    torch.save(tensor.contiguous() if _is_whole(tensor) else tensor.clone(memory_format=torch.contiguous_format), file)
                    length = file.tell() - begin
                    self.entries.append((MetadataIndex(place.key, torch.Size(place.offsets)), _StorageInfo(self.path.name, begin, length)))
                    self.written(tensor.nbytes)
        except BaseException as error:
            self.error = error


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


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


class _Slice(LoadPlanner):
    """Reads one box of one stored tensor into `target`."""

    def __init__(self, target: torch.Tensor):
        self.target = target

    def set_up_planner(self, *_, **__): ...
    def create_local_plan(self): ...
    def create_global_plan(self, global_plan): ...
    def finish_plan(self, central_plan): ...
    def load_bytes(self, read_item, value): ...
    def commit_tensor(self, read_item, tensor): ...

    def resolve_tensor(self, read_item):
        box = tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths))
        return self.target[box]


def read(folder: Path, metadata: Metadata, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """The box at `offsets` of the stored tensor `key`, [*sizes], from whichever files hold parts of it."""
    stored = metadata.state_dict_metadata[key]
    target = torch.empty(sizes, dtype=stored.properties.dtype)
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    items = create_read_items_for_chunk_list(key, stored, [box])
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(LoadPlan(items), _Slice(target)).wait()
    return target
