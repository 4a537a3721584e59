"""Next-token batches of a text corpus: samples of seq_len + 1 tokens as tokens, labels, masks and positions.

    train, valid = datasets(run, num_train, num_valid)     # what a RunConfig's data section describes
    batch = train.batch(sample_numbers)                    # tensors [b, seq_len]

Left out: which sample is which text (engine/data/pretraining.py and blend.py), and cutting batches for ranks (loader.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.data.blend import build_pretraining, build_pretraining_per_split
from engine.data.buffers import Shapes
from engine.data.indexed import DataError
from engine.data.mixture import build_mixture
from engine.stage import Batch


class NextToken:
    """A dataset of `engine.stage.Dataset` over samples with len(), seq_len and gather() or gather_into() (GPTSamples or Blend).

    reset_at_eod: positions restart after each EOD input token, and segment_ids tell documents apart.
    eod_mask_loss: no loss where the input is EOD. vocab_size: refuse ids outside it. num_threads: C++ threads that gather.
    Raises DataError when an EOD option is set without eod_id.
    """

    def __init__(self, samples, eod_id: int | None = None, reset_at_eod: bool = False, eod_mask_loss: bool = False,
                 vocab_size: int | None = None, num_threads: int = 1) -> None:
        if eod_id is None and (reset_at_eod or eod_mask_loss):
            raise DataError("reset_at_eod and eod_mask_loss need eod_id; give the tokenizer's end-of-document id")
        self.samples, self.seq_len = samples, samples.seq_len
        self.eod_id, self.reset_at_eod, self.eod_mask_loss = eod_id, reset_at_eod, eod_mask_loss
        self.vocab_size, self.num_threads = vocab_size, num_threads

    rows_per_sample = 1

    def __len__(self) -> int:
        return len(self.samples)

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Every sample is full."""
        return self.seq_len

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens, labels, position_ids int64 [b, s]; loss_mask float32 [b, s]; with reset_at_eod also segment_ids int32 [b, s],
        the number of EOD inputs before each position. Raises DataError for ids outside the vocabulary."""
        fields = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes(len(sample_numbers)).items()}
        self.read(sample_numbers, fields["text"])
        return self.complete(fields)

    # --- the same in three parts, for memory that is there already (loader.py) --------------------------------------------

    def shapes(self, num_rows: int) -> Shapes:
        """What a batch is made of: `text`, which is read, and the tensors of the batch, which follow from it."""
        shape = (num_rows, self.seq_len)
        shapes = {"text": ((num_rows, self.seq_len + 1), torch.int64), "tokens": (shape, torch.int64), "labels": (shape, torch.int64),
                  "loss_mask": (shape, torch.float32), "position_ids": (shape, torch.int64)}
        return {**shapes, "segment_ids": (shape, torch.int32)} if self.reset_at_eod else shapes

    @property
    def masks_follow_from_text(self) -> bool:
        """False: but for tokens and labels, every batch is the same."""
        return self.reset_at_eod or self.eod_mask_loss

    def read(self, sample_numbers: np.ndarray, text: torch.Tensor) -> None:
        """Fill text [b, s + 1], in place. Raises DataError for ids outside the vocabulary."""
        rows = text.numpy()
        if hasattr(self.samples, "gather_into"):
            self.samples.gather_into(sample_numbers, rows, num_threads=self.num_threads)
        else:
            rows[:] = self.samples.gather(sample_numbers)
        self._check_ids(rows, sample_numbers)

    def complete(self, fields: Batch) -> Batch:
        """Fill in the other fields from `text`; the batch that they are."""
        arrays = {name: tensor.numpy() for name, tensor in fields.items()}
        text, tokens = arrays.pop("text"), arrays["tokens"]
        np.copyto(tokens, text[:, :-1])
        np.copyto(arrays["labels"], text[:, 1:])
        arrays["loss_mask"].fill(1)
        np.copyto(arrays["position_ids"], np.arange(self.seq_len))
        if self.masks_follow_from_text:
            is_eod = tokens == self.eod_id
            if self.eod_mask_loss:
                arrays["loss_mask"][is_eod] = 0
            if self.reset_at_eod:
                arrays["position_ids"] -= segment_starts(is_eod)
                np.copyto(arrays["segment_ids"], np.cumsum(is_eod, axis=1) - is_eod, casting="same_kind")
        return {name: fields[name] for name in arrays}

    def outline(self) -> NextToken:
        """The same without its samples: what a rank needs that is told `text` by another. It can be pickled."""
        return NextToken(Absent(len(self.samples), self.seq_len), self.eod_id, self.reset_at_eod, self.eod_mask_loss, self.vocab_size)

    def _check_ids(self, text: np.ndarray, numbers: np.ndarray) -> None:
        if self.vocab_size is None or (text.min() >= 0 and text.max() < self.vocab_size):
            return
        row, column = np.argwhere((text < 0) | (text >= self.vocab_size))[0]
        raise DataError(
            f"sample {numbers[row]}, token {column}: id {text[row, column]} is outside the vocabulary of {self.vocab_size} "
            f"(0 to {self.vocab_size - 1}); the corpus was probably written with another tokenizer than the model's"
        )


@dataclass(frozen=True)
class Absent:
    """Samples that lie with another rank: how many there are, and nothing to read."""

    num_samples: int
    seq_len: int

    def __len__(self) -> int:
        return self.num_samples


def segment_starts(is_eod: np.ndarray) -> np.ndarray:
    """For each position the one after the last EOD strictly before it, 0 without one; bool [b, s] -> int64 [b, s]."""
    after = np.where(is_eod, np.arange(1, is_eod.shape[1] + 1), 0)
    starts = np.zeros_like(after)
    np.maximum.accumulate(after[:, :-1], axis=1, out=starts[:, 1:])
    return starts


def datasets(run, num_train: int, num_valid: int) -> tuple[NextToken, dict[str, NextToken]]:
    """The training set with at least num_train samples and the validation sets with num_valid each, as run.data says.

    Raises DataError for missing or broken corpora, too few tokens, and a tokenizer that is larger than the model's vocabulary.
    """
    data, seq_len, seed = run.data, run.train.seq_len, run.run.seed
    cache = data.cache_dir or str(Path(run.run.dir) / "index_cache")
    options = dict(eod_id=_eod_id(run), reset_at_eod=data.reset_at_eod, eod_mask_loss=data.eod_mask_loss, vocab_size=run.model.vocab_size,
                   num_threads=data.threads)
    is_mixture = bool(data.phases or data.replay)
    num_plain = 0 if is_mixture else num_train
    if data.split:
        train, valid, _ = build_pretraining(data.train, data.split, seq_len, (num_plain, num_valid, 0), seed, cache, data.one_epoch)
        named = {"valid": valid} if num_valid else {}
    else:
        train, _, _ = build_pretraining_per_split((data.train, None, None), seq_len, (num_plain, 0, 0), seed, cache, data.one_epoch)
        named = {name: build_pretraining_per_split((None, blend, None), seq_len, (0, num_valid, 0), seed, cache)[1]
                 for name, blend in data.valid.items()} if num_valid else {}
    if is_mixture:
        train = build_mixture(data, seq_len, num_train, seed, cache)
    for name, samples, wanted in (("data.train", train, num_train), *((f"data.valid.{n}", s, num_valid) for n, s in named.items())):
        if len(samples) < wanted:
            raise DataError(f"{name} holds {len(samples)} samples of {seq_len} tokens in one pass, but {wanted} are asked for; "
                            "lower train.steps or train.eval_samples, or give weights, which allow several epochs")
    return NextToken(train, **options), {name: NextToken(samples, **options) for name, samples in named.items()}


def _eod_id(run) -> int | None:
    """data.eod_id, else the tokenizer's."""
    if not run.data.tokenizer:
        return run.data.eod_id if run.data.eod_id >= 0 else None
    from data_tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(f"data.tokenizer={run.data.tokenizer} has {tokenizer.vocab_size} ids, but model.vocab_size is "
                        f"{run.model.vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more")
    return run.data.eod_id if run.data.eod_id >= 0 else tokenizer.eod_id
