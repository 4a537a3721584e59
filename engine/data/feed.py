"""Batches on their way to the device: copies that run beside the training, started as soon as a batch has been read.

    copies = open_copies(run, device)            # None where there is nothing to copy to
    copies.start(micro_batches)                  # in the thread that reads ahead
    tensor = copies.of(batch["tokens"])          # on the device, when the network asks

A stage sees tensors in host memory, and so it counts and cuts without waiting for a device; a copy of each is on the device, or under way,
by the time the network is fed. What a stage has made itself, and validation batches, are copied when they are asked for.

    data.feed=auto, copy      on a GPU: from pinned buffers, on a stream of its own, with an event that the training stream waits for
    data.feed=dali            through an external source of NVIDIA DALI, where that is installed; it also runs without a GPU
On a CPU `auto` and `copy` do nothing, since the memory that was read into is what the network reads.
Left out: DALI's decoders and augmentations, which text has no use for.
"""

from __future__ import annotations

import importlib.util
from collections import deque

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from engine.config import ConfigError
from engine.stage import Batch

HOW_TO_INSTALL = "pip install -c constraints.txt nvidia-dali-cuda130 (`make test-extras` does)"


def open_copies(run, device: str) -> SideStream | Dali | None:
    """What moves the batches of a run. Raises ConfigError for data.feed=dali without DALI."""
    if run.data.feed == "dali":
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            raise ConfigError([f"data.feed=dali needs NVIDIA DALI, which is not installed; {HOW_TO_INSTALL}, or set data.feed=auto"])
        return Dali(device)
    return SideStream() if device == "cuda" else None


def buffer_kind(run, device: str) -> str:
    """The kind of engine/data/buffers.py's Pool that training batches are read into. Raises ConfigError for pinned memory without a GPU."""
    if run.data.buffer == "pinned" and device != "cuda":
        raise ConfigError([f"data.buffer=pinned is memory that a GPU copies from, but this run is on {device}; set data.buffer=auto"])
    return run.data.buffer if run.data.buffer != "auto" else "pinned" if device == "cuda" else "plain"


def moved(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on the device. A pinned one is waited for: its buffer may hold the next batch before a copy that nobody watches is done."""
    return tensor.to(device, non_blocking=not tensor.is_pinned()) if torch.device(device).type == "cuda" else tensor.to(device)


class SideStream:
    """Copies on a CUDA stream of their own."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())  # of this rank; a new thread begins on GPU 0
        self._stream = torch.cuda.Stream(self._device)
        self._copies = WeakTensorKeyDictionary()  # host tensor -> (its copy, the event after which that is whole)
        self._underway: deque[tuple[torch.cuda.Event, list[Batch]]] = deque()

    def start(self, micro_batches: list[Batch]) -> None:
        """Begin to copy; returns at once."""
        while self._underway and self._underway[0][0].query():
            self._underway.popleft()
        done = torch.cuda.Event()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for batch in micro_batches:
                for tensor in batch.values():
                    self._copies[tensor] = tensor.to(self._device, non_blocking=True), done
            done.record(self._stream)
        self._underway.append((done, micro_batches))  # until then the host's buffer is being read, also if everybody else has let go of it

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, for work on the current stream."""
        copy, done = self._copies.get(tensor, (None, None))
        if copy is None:
            return moved(tensor, self._device)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        copy.record_stream(stream)  # it was allocated on the other stream, which must not give its memory away too early
        return copy


class Dali:
    """Batches through external sources of NVIDIA DALI, one pipeline for each set of names and dtypes. device: cpu or cuda."""

    def __init__(self, device: str) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self._pipelines: dict[tuple, object] = {}
        self._copies = WeakTensorKeyDictionary()

    def start(self, micro_batches: list[Batch]) -> None:
        """Run a pipeline per micro-batch."""
        for batch in micro_batches:
            pipeline = self._pipeline(batch)
            for name, tensor in batch.items():
                pipeline.feed_input(name, tensor.numpy())
            for tensor, output in zip(batch.values(), pipeline.run()):
                # clone: the pipeline fills its outputs again when it runs next
                self._copies[tensor] = torch.from_dlpack(output.as_tensor()).reshape(tensor.shape).clone()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # this thread's; the training thread then finds whole tensors

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        copy = self._copies.get(tensor)
        return moved(tensor, self._device) if copy is None else copy

    def _pipeline(self, batch: Batch):
        rows = len(next(iter(batch.values())))
        key = (rows, *((name, tensor.dtype, tensor.dim()) for name, tensor in batch.items()))
        if key not in self._pipelines:
            self._pipelines[key] = _built(self._device, rows, list(batch))
        return self._pipelines[key]


def _built(device: torch.device, rows: int, names: list[str]):
    from nvidia.dali import Pipeline, fn

    gpu = device.index if device.type == "cuda" else None
    pipeline = Pipeline(batch_size=rows, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        sources = [fn.external_source(name=name) for name in names]
        pipeline.set_outputs(*(source.gpu() if gpu is not None else source for source in sources))
    pipeline.build()
    return pipeline
