"""Micro-batches of one data-parallel rank, as torch tensors on the host.

In: a dataset (engine/stage.py) and a global sample number. Out: for each micro-batch a dict of tensors of micro_batch samples,
[rows, s] where s is train.seq_len, or less where every row of the global batch ends in padding. The position in the data is that one
number and nothing else is kept, so a run resumes at any sample, with any number of data-parallel ranks, on the same data.

A global batch is read into one buffer (buffers.py), and its micro-batches are slices of that. A dataset that can fill memory it is given
(`shapes`, `read`, `complete`: text.py) is read right into it, by C++ threads that do not hold the GIL; what others make in Python is
copied there where a GPU or another rank is to have it. With a line (replica.py) only the first rank of a replica reads.

Left out: moving to a device (feed.py), context-parallel slicing, worker processes (see Prefetcher for what runs beside the training).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.buffers import Block, Pool, shapes_of
from engine.data.indexed import DataError
from engine.stage import Batch, Dataset


class Loader:
    """Cuts global batches into the micro-batches of one data-parallel rank. Raises DataError for sizes that do not fit together.

    multiple: what the length of a trimmed sequence must divide by (the layout's sequence and context parallel want it).
    line: the replica.Line on which its first rank passes on what it reads; None reads on this rank. text_to_ends: ranks in the middle of
    the pipeline may get zeros for the tokens and labels of a text whose masks do not depend on them.
    """

    num_samples_read = 0  # by this rank itself

    def __init__(self, dataset: Dataset, micro_batch: int, dp_rank: int, dp_size: int, multiple: int = 1, pool: Pool | None = None, line=None,
                 text_to_ends: bool = False) -> None:
        if micro_batch < 1 or not 0 <= dp_rank < dp_size:
            raise DataError(f"micro_batch {micro_batch}, dp_rank {dp_rank}, dp_size {dp_size}: expected micro_batch >= 1 and 0 <= dp_rank < dp_size")
        self.dataset, self.micro_batch, self.dp_rank, self.dp_size, self.multiple = dataset, micro_batch, dp_rank, dp_size, multiple
        self.pool, self.line, self.text_to_ends = pool or Pool(), line, text_to_ends
        self.fills_memory = hasattr(dataset, "complete")

    def batches(self, first_sample: int, global_batch: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at global sample number first_sample. With a line collective over the replica.

        Raises DataError when the global batch does not divide and when the data ends before it.
        """
        whole = self._filled(first_sample, global_batch) if self.fills_memory else self._made(first_sample, global_batch)
        num_rows = self.micro_batch * self.dataset.rows_per_sample
        rows = {name: tensor.split(num_rows) for name, tensor in whole.items()}
        return [{name: rows[name][m] for name in rows} for m in range(len(rows["tokens"]))]

    def _filled(self, first_sample: int, global_batch: int) -> Batch:
        """The rows of this replica, read by the dataset into memory of the pool."""
        def read() -> Block:
            numbers = self._numbers(first_sample, global_batch)
            block = self.pool.block(self.dataset.shapes(numbers.size))
            self.dataset.read(numbers, block.fields["text"])
            return block

        only_to_ends = self.text_to_ends and not self.dataset.masks_follow_from_text
        block = self.line.share(read, self.pool, "text", only_to_ends) if self.line else read()
        return self.dataset.complete(block.fields)

    def _made(self, first_sample: int, global_batch: int) -> Batch:
        """The rows of this replica, as the dataset makes them; in memory of the pool where it is not only for this process and its CPU."""
        def read() -> Batch:
            whole = self.dataset.batch(self._numbers(first_sample, global_batch))
            return self._trimmed(whole, np.arange(first_sample, first_sample + global_batch))

        def copied() -> Block:
            whole = read()
            block = self.pool.block(shapes_of(whole))
            for name, tensor in whole.items():
                block.fields[name].copy_(tensor)
            return block

        if self.line:
            return self.line.share(copied, self.pool).fields
        return read() if self.pool.kind == "plain" else copied().fields

    def _trimmed(self, whole: Batch, global_numbers: np.ndarray) -> Batch:
        """Without the columns that are padding in all of the global batch, so that every replica's batches have one shape."""
        seq_len = whole["tokens"].size(1)
        length = min(-(-self.dataset.longest(global_numbers) // self.multiple) * self.multiple, seq_len)
        if length == seq_len:
            return whole
        return {name: t[:, :length].contiguous() if t.dim() == 2 and t.size(1) == seq_len else t for name, t in whole.items()}

    def _numbers(self, first_sample: int, global_batch: int) -> np.ndarray:
        numbers = self.sample_numbers(first_sample, global_batch).reshape(-1)
        self.num_samples_read += numbers.size
        return numbers

    def sample_numbers(self, first_sample: int, global_batch: int) -> np.ndarray:
        """The global sample numbers of this replica, int64 [num_microbatches, micro_batch]."""
        stride = self.micro_batch * self.dp_size
        if global_batch < 1 or global_batch % stride:
            raise DataError(
                f"global_batch {global_batch} is not a multiple of micro_batch({self.micro_batch}) * dp({self.dp_size}) = {stride}; change one of them"
            )
        if first_sample < 0 or first_sample + global_batch > len(self.dataset):
            raise DataError(
                f"samples {first_sample} to {first_sample + global_batch - 1} are asked for, but the dataset has {len(self.dataset)}; "
                "lower the number of steps, or build the dataset with more samples"
            )
        starts = first_sample + np.arange(global_batch // stride) * stride + self.dp_rank * self.micro_batch
        return starts[:, None] + np.arange(self.micro_batch)


@dataclass(frozen=True)
class Elsewhere:
    """A dataset that another rank reads: its outline, for a Loader with a line."""

    num_samples: int
    rows_per_sample: int

    def __len__(self) -> int:
        return self.num_samples


def outline(dataset: Dataset):
    """What stands for a dataset on ranks that are told its batches; it can be pickled."""
    return dataset.outline() if hasattr(dataset, "outline") else Elsewhere(len(dataset), dataset.rows_per_sample)


class Prefetcher:
    """Iterates over the global batches at the given positions, reading up to `depth` of them while the caller computes with one.

    positions: (first_sample, global_batch) pairs; they are asked for as the reading goes on, in the background thread.
    then: called there with the micro-batches of each. An exception of the loader or of positions is raised by the next() that would have
    returned that batch, and ends the iteration. Use as a context manager or call close(): either waits for the thread, except where the
    context ends in an exception and the loader has a line, since other ranks may then never answer.
    """

    def __init__(self, loader: Loader, positions: Iterable[tuple[int, int]], depth: int = 1, then: Callable[[list[Batch]], None] | None = None) -> None:
        self._loader, self._positions, self._then = loader, iter(positions), then
        self._ready: queue.SimpleQueue = queue.SimpleQueue()  # (micro-batches, None), (None, error); (None, None) at the end
        self._change = threading.Condition()
        self._num_allowed, self._is_closed = depth, False
        # Not a pool's thread, which Python would wait for at exit whatever it waits for itself.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        num_read = 0
        while self._may_read(num_read):
            try:
                position = next(self._positions, None)
                found = None if position is None else self._loader.batches(*position)
                if found is not None and self._then:
                    self._then(found)
                self._ready.put((found, None))
            except BaseException as error:
                found = None
                self._ready.put((None, error))
            if found is None:
                return
            num_read += 1

    def _may_read(self, num_read: int) -> bool:
        """Wait until another batch may be read; False when there will be none. With a line the ranks close after the same number of
        batches and every one of them still reads all that it may, so that none is left waiting for another."""
        with self._change:
            self._change.wait_for(lambda: num_read < self._num_allowed or self._is_closed)
            return num_read < self._num_allowed and (not self._is_closed or self._loader.line is not None)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._is_closed:
            raise StopIteration
        batches, error = self._ready.get()
        if batches is None:
            self.close()
            raise error or StopIteration
        with self._change:
            self._num_allowed += 1
            self._change.notify()
        return batches

    def close(self, wait: bool = True) -> None:
        """Ends the iteration and waits for the background thread; may be called again."""
        with self._change:
            self._is_closed = True
            self._change.notify()
        if wait:
            self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.close(wait=error_type is None or self._loader.line is None)
