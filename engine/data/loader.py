"""Micro-batches of one data-parallel rank, as torch tensors on the host.

In: a dataset with len() and gather() (GPTSamples or Blend) and a global sample number. Out: for each micro-batch a dict of
[micro_batch, seq_len] tensors. The position in the data is that one number and nothing else is kept, so a run resumes at any
sample, with any number of data-parallel ranks, on the same data.

Left out: moving to a device, context-parallel slicing, worker processes (gathering runs without the GIL; see Prefetcher).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from engine.data.blend import Dataset
from engine.data.indexed import DataError

Batch = dict[str, torch.Tensor]


class Loader:
    """Cuts global batches into the micro-batches of one data-parallel rank.

    reset_at_eod: positions restart after each EOD input token, and segment_ids tell documents apart.
    eod_mask_loss: no loss where the input is EOD. vocab_size: refuse ids outside it. Raises DataError for sizes that
    do not fit together and when an EOD option is set without eod_id.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        eod_id: int | None = None,
        reset_at_eod: bool = False,
        eod_mask_loss: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        if dataset.seq_len != seq_len:
            raise DataError(f"the dataset was built with seq_len {dataset.seq_len}, the loader with {seq_len}; use one value")
        if micro_batch < 1 or not 0 <= dp_rank < dp_size:
            raise DataError(f"micro_batch {micro_batch}, dp_rank {dp_rank}, dp_size {dp_size}: expected micro_batch >= 1 and 0 <= dp_rank < dp_size")
        if eod_id is None and (reset_at_eod or eod_mask_loss):
            raise DataError("reset_at_eod and eod_mask_loss need eod_id; give the tokenizer's end-of-document id")
        self.dataset, self.seq_len, self.micro_batch = dataset, seq_len, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.eod_id, self.reset_at_eod, self.eod_mask_loss = eod_id, reset_at_eod, eod_mask_loss
        self.vocab_size = vocab_size

    def batches(self, first_sample: int, global_batch: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at global sample number first_sample.

        Each dict: tokens, labels, position_ids int64 [b, s]; loss_mask float32 [b, s]; with reset_at_eod also
        segment_ids int32 [b, s], the number of EOD inputs before each position. Raises DataError when the global batch
        does not divide, when the data ends before it, and for ids outside the vocabulary.
        """
        numbers = self.sample_numbers(first_sample, global_batch)  # [num_microbatches, micro_batch]
        text = self.dataset.gather(numbers.reshape(-1))  # [num_microbatches * micro_batch, seq_len + 1]
        self._check_ids(text, numbers.reshape(-1))
        return [self._batch(rows) for rows in np.split(text, numbers.shape[0])]

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

    def _check_ids(self, text: np.ndarray, numbers: np.ndarray) -> None:
        if self.vocab_size is None or (text.min() >= 0 and text.max() < self.vocab_size):
            return
        row, column = np.argwhere((text < 0) | (text >= self.vocab_size))[0]
        raise DataError(
            f"sample {numbers[row]}, token {column}: id {text[row, column]} is outside the vocabulary of {self.vocab_size} "
            f"(0 to {self.vocab_size - 1}); the corpus was probably written with another tokenizer than the model's"
        )

    def _batch(self, text: np.ndarray) -> Batch:
        tokens = np.ascontiguousarray(text[:, :-1])
        is_eod = tokens == self.eod_id if self.eod_id is not None else np.zeros(tokens.shape, dtype=bool)
        batch = {
            "tokens": tokens,
            "labels": np.ascontiguousarray(text[:, 1:]),
            "loss_mask": (~is_eod).astype(np.float32) if self.eod_mask_loss else np.ones(tokens.shape, dtype=np.float32),
            "position_ids": np.tile(np.arange(self.seq_len), (tokens.shape[0], 1)),
        }
        if self.reset_at_eod:
            batch["position_ids"] -= segment_starts(is_eod)
            batch["segment_ids"] = (np.cumsum(is_eod, axis=1) - is_eod).astype(np.int32)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def segment_starts(is_eod: np.ndarray) -> np.ndarray:
    """For each position the one after the last EOD strictly before it, 0 without one; bool [b, s] -> int64 [b, s]."""
    after = np.where(is_eod, np.arange(1, is_eod.shape[1] + 1), 0)
    starts = np.zeros_like(after)
    np.maximum.accumulate(after[:, :-1], axis=1, out=starts[:, 1:])
    return starts


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
