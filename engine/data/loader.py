"""Micro-batches of one data-parallel rank, as torch tensors on the host.

In: a dataset (engine/stage.py) and a global sample number. Out: for each micro-batch a dict of tensors of micro_batch samples,
[rows, s] where s is train.seq_len, or less where every row of the global batch ends in padding. The position in the data is that one number and nothing else is kept, so a run resumes at any
sample, with any number of data-parallel ranks, on the same data.

Left out: moving to a device, context-parallel slicing, worker processes (gathering runs without the GIL; see Prefetcher).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine.data.indexed import DataError
from engine.stage import Batch, Dataset


class Loader:
    """Cuts global batches into the micro-batches of one data-parallel rank. Raises DataError for sizes that do not fit together.

    multiple: what the length of a trimmed sequence must divide by (the layout's sequence and context parallel want it).
    """

    def __init__(self, dataset: Dataset, micro_batch: int, dp_rank: int, dp_size: int, multiple: int = 1) -> None:
        if micro_batch < 1 or not 0 <= dp_rank < dp_size:
            raise DataError(f"micro_batch {micro_batch}, dp_rank {dp_rank}, dp_size {dp_size}: expected micro_batch >= 1 and 0 <= dp_rank < dp_size")
        self.dataset, self.micro_batch, self.dp_rank, self.dp_size, self.multiple = dataset, micro_batch, dp_rank, dp_size, multiple

    def batches(self, first_sample: int, global_batch: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at global sample number first_sample.

        Raises DataError when the global batch does not divide and when the data ends before it.
        """
        numbers = self.sample_numbers(first_sample, global_batch)  # [num_microbatches, micro_batch]
        whole = self._trimmed(self.dataset.batch(numbers.reshape(-1)), np.arange(first_sample, first_sample + global_batch))
        num_rows = self.micro_batch * self.dataset.rows_per_sample
        rows = {name: tensor.split(num_rows) for name, tensor in whole.items()}
        return [{name: rows[name][m] for name in rows} for m in range(len(numbers))]

    def _trimmed(self, whole: Batch, global_numbers: np.ndarray) -> Batch:
        """Without the columns that are padding in all of the global batch, so that every replica's batches have one shape."""
        seq_len = whole["tokens"].size(1)
        length = min(-(-self.dataset.longest(global_numbers) // self.multiple) * self.multiple, seq_len)
        if length == seq_len:
            return whole
        return {name: t[:, :length].contiguous() if t.dim() == 2 and t.size(1) == seq_len else t for name, t in whole.items()}

    def sample_numbers(self, first_sample: int, global_batch: int) -> np.ndarray:
        """The global sample numbers this rank reads, int64 [num_microbatches, micro_batch]."""
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


class Prefetcher:
    """Iterates over the global batches at the given positions, reading the next one while the caller computes.

    positions: (first_sample, global_batch) pairs; they are asked for one global batch ahead, in the background thread.
    An exception of the loader or of positions is raised by the next() that would have returned that batch, and ends the
    iteration. Use as a context manager or call close(): either waits for the thread.
    """

    def __init__(self, loader: Loader, positions: Iterable[tuple[int, int]]) -> None:
        self._loader = loader
        self._positions = iter(positions)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: Future[list[Batch] | None] | None = self._thread.submit(self._read)

    def _read(self) -> list[Batch] | None:
        position = next(self._positions, None)
        return None if position is None else self._loader.batches(*position)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            raise StopIteration
        try:
            batches = self._ahead.result()
        except BaseException:
            self.close()
            raise
        if batches is None:
            self.close()
            raise StopIteration
        self._ahead = self._thread.submit(self._read)
        return batches

    def close(self) -> None:
        """Ends the iteration and waits for the background thread; may be called again."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
