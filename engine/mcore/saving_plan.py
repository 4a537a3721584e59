"""Which rank writes what of a checkpoint, and the bytes of it: sharded states -> torch_dist files, without a process of their own.

    plan = divide(parts)                               # collective: every rank then knows every rank's shards
    found = write_own(folder, plan)                    # any thread: this rank's files
    described = describe(folder, plan, every rank's found)   # rank 0: .metadata, common.pt, metadata.json and the small files

A shard that several ranks hold (replicas) is written by one of them, so that each writes about the same number of bytes. The files are
those of torch.distributed.checkpoint, as in stream.py, so megatron's dist_checkpointing and torch read them as any other.
Left out: when a folder may be called a checkpoint (saving.py).
"""

import io
import json
import math
import pickle
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties,
                                                   TensorStorageMetadata)

from engine import hashes
from engine.mapped import bytes_of
from engine.mcore import stream

NUM_THREADS = 2  # that write, each a file of its own
AROUND = 1536  # bytes of an archive beside the numbers of its tensor, at most
FORMAT = CheckpointingConfig("torch_dist", 1, "torch", 1)


@dataclass
class Part:
    """One network in a checkpoint: in `folder` below it ("" or "roles/critic"), what megatron calls a sharded state dict, and small files.
    buffers: tensors of the state that change otherwise than by an optimizer's step."""

    folder: str
    state: dict
    files: dict[str, str] = field(default_factory=dict)
    buffers: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """A box of a stored tensor: [*sizes] at `offsets` of [*whole]. An object has neither."""

    part: int
    key: str
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    num_bytes: int = 0


@dataclass
class Plan:
    """owned: the shards that each rank writes. mine: of this rank's, what is to be written, a tensor or the bytes of an object. at_once: those
    of `mine`, by number, that are buffers."""

    folders: list[str]
    owned: list[list[Shard]]
    mine: list[torch.Tensor | bytes]
    at_once: set[int]
    files: list[dict[str, bytes]]  # the small ones of each part, known to rank 0 alone
    serial: int  # of this save, as rank 0 counts: equal on every rank

    @property
    def num_bytes(self) -> int:
        """What a disk has to have room for: all ranks' shards and what lies around them."""
        small = sum(len(data) for files in self.files for data in files.values())
        shards = [shard for shards in self.owned for shard in shards]
        return sum(shard.num_bytes + AROUND for shard in shards) + small + (64 << 10)


def divide(parts: list[Part], serial: int = 0) -> Plan:
    """Collective. Raises ValueError when the ranks' shards do not make up a tensor."""
    held, files = {}, []
    for number, part in enumerate(parts):
        sharded, common = save_preprocess(part.state, validate_access_integrity=False)
        for value in nested_values(sharded):
            shard, data, is_main = _described(number, value)
            held.setdefault(shard, (data, is_main))
        files.append({"common.pt": _saved(common), "metadata.json": json.dumps(asdict(FORMAT)).encode(),
                      **{name: text.encode() for name, text in part.files.items()}} if dist.get_rank() == 0 else {})
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (serial, [(shard, is_main) for shard, (_, is_main) in held.items()]))
    owned = _owned([shards for _, shards in everybody])
    _refuse_gaps(owned)
    mine = [held[shard][0] for shard in owned[dist.get_rank()]]
    buffers = {buffer.untyped_storage().data_ptr() for part in parts for buffer in part.buffers}
    at_once = {number for number, data in enumerate(mine) if isinstance(data, torch.Tensor) and data.untyped_storage().data_ptr() in buffers}
    return Plan([part.folder for part in parts], owned, mine, at_once, files, everybody[0][0])


def _described(part: int, value: ShardedTensor | ShardedObject) -> tuple[Shard, torch.Tensor | bytes, bool]:
    is_main = is_main_replica(value.replica_id)
    if isinstance(value, ShardedObject):
        data = _saved([value.data])  # a list, as megatron's own writer makes one
        return Shard(part, value.unique_key, num_bytes=len(data)), data, is_main
    sizes = (1,) * value.prepend_axis_num + tuple(value.local_shape)
    tensor = value.data.detach()
    return Shard(part, value.key, tuple(value.global_offset), sizes, tuple(value.global_shape), tensor.dtype, tensor.nbytes), tensor.view(sizes), is_main


def _saved(data) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def _owned(everybody: list[list[tuple[Shard, bool]]]) -> list[list[Shard]]:
    """The shards that each rank writes: of those that hold one the rank that has least to write so far. The largest are given out first. The
    replicas of an object may differ; the main one is written."""
    holders: dict[tuple, list[tuple[int, Shard]]] = defaultdict(list)
    for rank, shards in enumerate(everybody):
        for shard, is_main in shards:
            if shard.offsets is not None or is_main:
                holders[shard.part, shard.key, shard.offsets].append((rank, shard))
    owned, load = [[] for _ in everybody], [0] * len(everybody)
    for place, found in sorted(holders.items(), key=lambda item: (-item[1][0][1].num_bytes, item[0][:2], item[0][2] or ())):
        rank, shard = min(found, key=lambda holder: load[holder[0]])
        owned[rank].append(shard)
        load[rank] += shard.num_bytes + AROUND
    return owned


def _refuse_gaps(owned: list[list[Shard]]) -> None:
    """Boxes of a tensor that are too few or too many would be a checkpoint that nobody can load."""
    there, wanted = defaultdict(int), {}
    for shards in owned:
        for shard in shards:
            if shard.offsets is not None:
                there[shard.part, shard.key] += math.prod(shard.sizes)
                wanted[shard.part, shard.key] = math.prod(shard.whole)
    wrong = [f"{place[1]} has {there[place]} of {size} numbers" for place, size in wanted.items() if there[place] != size]
    if wrong:
        raise ValueError(f"the ranks' shards do not make up the tensors: {'; '.join(sorted(wrong)[:5])}")


# --- files -----------------------------------------------------------------------------------------------------------


def write_own(folder: Path, plan: Plan, rank: int) -> dict:
    """This rank's shards into files of its own, on the disk when this returns. {"places": [[file, offset, length], ...] in the order of
    plan.mine, "files": {path below folder: entry of hashes.json}}."""
    shares = _shares(plan, rank)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(lambda share: _write_file(folder, plan, *share), shares.items()))
    places = {number: place for written, _ in found for number, place in written}
    return {"places": [places[number] for number in range(len(plan.mine))], "files": {name: entry for _, (name, entry) in found}}


def _shares(plan: Plan, rank: int) -> dict[str, list[int]]:
    """File below the checkpoint -> the shards in it, by their place in plan.mine; about the same number of bytes in each of a part's."""
    shares, load = defaultdict(list), defaultdict(int)
    for number, shard in enumerate(plan.owned[rank]):
        names = [f"{plan.folders[shard.part]}/__{rank}_{i}.distcp".lstrip("/") for i in range(NUM_THREADS)]
        name = min(names, key=lambda name: load[name])
        shares[name].append(number)
        load[name] += shard.num_bytes + AROUND
    return shares


def _write_file(folder: Path, plan: Plan, name: str, numbers: list[int]) -> tuple[list, tuple[str, dict]]:
    places = []
    with hashes.HashedFile(folder / name) as file:
        for number in numbers:
            file.write(bytes(-file.tell() % stream.ALIGNMENT))
            begin, data = file.tell(), plan.mine[number]
            if isinstance(data, bytes):
                file.write(data)
            else:
                head, tail = stream.around(tuple(data.shape), data.dtype)
                for piece in (head, bytes_of(data.cpu()), tail):
                    file.write(piece)
            places.append((number, [Path(name).name, begin, file.tell() - begin]))
    return places, (name, file.entry)


def describe(folder: Path, plan: Plan, found: list[dict]) -> dict[str, dict]:
    """Write what makes a checkpoint of all ranks' files. Returns the entries of hashes.json of everything in the folder."""
    entries = {name: entry for one in found for name, entry in one["files"].items()}
    for number, below in enumerate(plan.folders):
        small = {**plan.files[number], ".metadata": pickle.dumps(_metadata(number, plan, found))}
        for name, data in small.items():
            path = folder / below / name
            with hashes.HashedFile(path) as file:
                file.write(data)
            entries[path.relative_to(folder).as_posix()] = file.entry
    return entries


def _metadata(part: int, plan: Plan, found: list[dict]) -> Metadata:
    """torch's description of one part."""
    described, places = {}, {}
    for shards, one in zip(plan.owned, found):
        for shard, place in zip(shards, one["places"]):
            if shard.part != part:
                continue
            if shard.offsets is None:
                described[shard.key] = BytesStorageMetadata()
                places[MetadataIndex(shard.key)] = _StorageInfo(*place)
                continue
            entry = described.setdefault(shard.key, TensorStorageMetadata(TensorProperties(dtype=shard.dtype), torch.Size(shard.whole), []))
            entry.properties.dtype = torch.promote_types(entry.properties.dtype, shard.dtype)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes)))
            places[MetadataIndex(shard.key, torch.Size(shard.offsets))] = _StorageInfo(*place)
    return Metadata(described, None, places)
