"""Weight files of a Hugging Face folder, written tensor by tensor.

    shapes = outline(family, model, tensors)         # HF name -> meta tensor: what will be written, before anything is read
    write(folder, shapes, names.rows_to_hf(family.pairs(model), tensors), shard_bytes=5e9)

A safetensors file is a length, a JSON header and raw tensors behind one another; since names, shapes and dtypes are known first, the
headers are too, and each tensor goes straight to its place from one of a few threads. Memory is that of the tensors underway.
Left out: reading (load.py).
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

import torch
from torch import Tensor

from engine.hf.fields import HFError
from engine.hf.load import INDEX, SHORT, WEIGHTS
from engine.mapped import write_all
from engine.rows import Rows, pieces, shape_of

NUM_THREADS = 2


class _Over(Mapping[str, Tensor]):
    """What two views of `tensors` share: its names, asked for without reading a tensor."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __contains__(self, name) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Outline(_Over):
    """Tensors of the shapes and dtypes of `tensors` without their numbers (device meta)."""

    def __getitem__(self, name: str) -> Tensor:
        if hasattr(self._tensors, "shape"):  # a checkpoint knows without reading
            return torch.empty(self._tensors.shape(name), dtype=self._tensors.dtype(name), device="meta")
        return self._tensors[name].to("meta")


def outline(family, model, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """HF name -> meta tensor of all that family.to_hf makes of engine tensors; floating ones as `dtype`, unless that is None or the family keeps them in
    fp32 (its IN_FP32: ends of names)."""
    in_fp32 = getattr(family, "IN_FP32", ())
    return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() and not (in_fp32 and name.endswith(in_fp32)) else tensor
            for name, tensor in family.to_hf(model, Outline(tensors))}


class Ahead(_Over):
    """`tensors`, of which those that follow in `order` are read in the background, `depth` at a time. Close it, or use it in a with."""

    def __init__(self, tensors: Mapping[str, Tensor], order: Iterable[str], depth: int = NUM_THREADS):
        super().__init__(tensors)
        self._order, self._depth = [name for name in order if name in tensors], depth
        self._at = {name: i for i, name in enumerate(self._order)}
        self._pool, self._coming = ThreadPoolExecutor(depth, thread_name_prefix="ahead"), {}

    def __getitem__(self, name: str) -> Tensor:
        coming: Future | None = self._coming.pop(name, None)
        at = self._at.get(name, len(self._order))
        for following in self._order[at + 1:at + 1 + self._depth]:
            if following not in self._coming:
                self._coming[following] = self._pool.submit(self._tensors.__getitem__, following)
        return coming.result() if coming else self._tensors[name]

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass
class _Shard:
    """One file: the byte range of each tensor in it, counted from the end of the header."""

    ranges: dict[str, tuple[int, int]]
    size: int = 0
    base: int = 0
    path: Path = Path()


def write(folder: Path, shapes: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor | Rows]], shard_bytes: float,
          written: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write `tensors` as model.safetensors or, where they exceed shard_bytes, as several files with an index.

    shapes: what will come, from `outline`; floating tensors are converted to its dtypes. Raises HFError when what comes differs.
    """
    shards = _cut(shapes, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    where = {name: shard for shard in shards for name in shard.ranges}
    room, done = BoundedSemaphore(2 * NUM_THREADS), []  # tensors in memory beside those being made
    for shard, file_name in zip(shards, names):
        _start(shard, folder / file_name, shapes)
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="write") as pool:
        for name, rows in tensors:
            if name not in where or shape_of(rows) != shapes[name].shape:
                raise HFError(f"{name} {list(shape_of(rows))} was not expected: the name map does not agree with itself")
            room.acquire()
            work = pool.submit(_put, where.pop(name), name, pieces(rows), shapes[name].dtype, written)
            work.add_done_callback(lambda _: room.release())
            done.append(work)
            del rows
    for work in done:
        work.result()
    if where:
        raise HFError(f"the name map gave no {', '.join(where)}")
    if len(shards) > 1:
        weight_map = {name: file_name for shard, file_name in zip(shards, names) for name in shard.ranges}
        total = sum(shard.size for shard in shards)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")


def _cut(shapes: Mapping[str, Tensor], shard_bytes: float) -> list[_Shard]:
    shards = [_Shard({})]
    for name, tensor in shapes.items():
        num_bytes = math.prod(tensor.shape) * tensor.element_size()
        if shards[-1].ranges and shards[-1].size + num_bytes > shard_bytes:
            shards.append(_Shard({}))
        shard = shards[-1]
        shard.ranges[name] = (shard.size, shard.size + num_bytes)
        shard.size += num_bytes
    return shards


def _start(shard: _Shard, path: Path, shapes: Mapping[str, Tensor]) -> None:
    """Write the header and make the file as long as it will be, so that a full disk is known before the work."""
    header = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    for name, ends in shard.ranges.items():
        header[name] = {"dtype": SHORT[shapes[name].dtype], "shape": list(shapes[name].shape), "data_offsets": list(ends)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    shard.base = 8 + len(text)
    shard.path = path
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if shard.size:
            os.posix_fallocate(file.fileno(), 0, shard.base + shard.size)


def _put(shard: _Shard, name: str, rows: Rows, dtype: torch.dtype, written: Callable[[int], None]) -> None:
    begin, end = shard.ranges[name]
    descriptor = os.open(shard.path, os.O_WRONLY)  # for each tensor: a model may have more shards than a process may have files
    try:
        write_all(descriptor, [row.to(device="cpu", dtype=dtype) for row in rows], shard.base + begin)
    finally:
        os.close(descriptor)
    written(end - begin)
