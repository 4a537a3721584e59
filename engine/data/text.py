"""Next-token batches of a text corpus: samples of seq_len + 1 tokens as tokens, labels, masks and positions.

    train, valid = datasets(run, num_train, num_valid)     # what a RunConfig's data section describes
    batch = train.batch(sample_numbers)                    # tensors [b, seq_len]

Left out: which sample is which text (engine/data/pretraining.py, blend.py and mixture.py), and cutting batches for ranks (loader.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine import schedule
from engine.data.blend import build_pretraining, build_pretraining_per_split
from engine.data.buffers import Shapes
from engine.data.fim import FillMiddle
from engine.data.indexed import DataError
from engine.data.ledger import Ledger, history, names_of, source_numbers
from engine.data.mixture import Mixture, build_mixture
from engine.data.orders import kept
from engine.stage import Batch

log = logging.getLogger(__name__)
MANY = 20  # caps that are told one by one


class NextToken:
    """A dataset of `engine.stage.Dataset` over samples with len(), seq_len and gather() or gather_into() (GPTSamples or Blend).

    reset_at_eod: positions restart after each EOD input token, and segment_ids tell documents apart.
    eod_mask_loss: no loss where the input is EOD. vocab_size: refuse ids outside it. num_threads: C++ threads that gather. fim: changes the
    text of a sample. source_names: every batch says which of these each row comes from; where empty, none does.
    Raises DataError when an EOD option is set without eod_id.
    """

    def __init__(self, samples, eod_id: int | None = None, reset_at_eod: bool = False, eod_mask_loss: bool = False,
                 vocab_size: int | None = None, num_threads: int = 1, fim: FillMiddle | None = None, source_names: Sequence[str] = ()) -> None:
        if eod_id is None and (reset_at_eod or eod_mask_loss):
            raise DataError("reset_at_eod and eod_mask_loss need eod_id; give the tokenizer's end-of-document id")
        self.samples, self.seq_len = samples, samples.seq_len
        self.eod_id, self.reset_at_eod, self.eod_mask_loss = eod_id, reset_at_eod, eod_mask_loss
        self.vocab_size, self.num_threads, self.fim, self.source_names = vocab_size, num_threads, fim, list(source_names)
        place = {name: k for k, name in enumerate(self.source_names)}
        self._source_places = np.array([place[name] for name in names_of(samples)] if place else [], dtype=np.int64)

    rows_per_sample = 1

    def __len__(self) -> int:
        return len(self.samples)

    def longest(self, sample_numbers: np.ndarray) -> int:
        """Every sample is full."""
        return self.seq_len

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """tokens, labels, position_ids int64 [b, s]; loss_mask float32 [b, s]; with reset_at_eod also segment_ids int32 [b, s],
        the number of EOD inputs before each position; with source_names `source` int64 [b], the place of each row's corpus among them.
        Raises DataError for ids outside the vocabulary."""
        fields = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes(len(sample_numbers)).items()}
        self.read(sample_numbers, fields["text"])
        return self.complete(fields)

    # --- the same in three parts, for memory that is there already (loader.py) --------------------------------------------

    def shapes(self, num_rows: int) -> Shapes:
        """What a batch is made of: `text`, which is read, and the tensors of the batch, which follow from it. Sources stand in `text` too,
        behind the rows of tokens, because it is all that one rank tells another."""
        shape = (num_rows, self.seq_len)
        more = -(-num_rows // (self.seq_len + 1)) if self.source_names else 0
        shapes = {"text": ((num_rows + more, self.seq_len + 1), torch.int64), "tokens": (shape, torch.int64), "labels": (shape, torch.int64),
                  "loss_mask": (shape, torch.float32), "position_ids": (shape, torch.int64)}
        if self.reset_at_eod:
            shapes["segment_ids"] = (shape, torch.int32)
        if self.source_names:
            shapes["source"] = ((num_rows,), torch.int64)
        return shapes

    @property
    def masks_follow_from_text(self) -> bool:
        """False: but for tokens and labels, every batch is the same."""
        return self.reset_at_eod or self.eod_mask_loss

    def read(self, sample_numbers: np.ndarray, text: torch.Tensor) -> None:
        """Fill `text` of `shapes`, in place. Raises DataError for ids outside the vocabulary."""
        text, num_rows = text.numpy(), len(sample_numbers)
        rows = text[:num_rows]  # [b, s + 1]
        if hasattr(self.samples, "gather_into"):
            self.samples.gather_into(sample_numbers, rows, num_threads=self.num_threads)
        else:
            rows[:] = self.samples.gather(sample_numbers)
        self._check_ids(rows, sample_numbers)
        if self.fim is not None:
            rows[:] = self.fim(rows, sample_numbers)
        if self.source_names:
            text[num_rows:].reshape(-1)[:num_rows] = self._source_places[source_numbers(self.samples, sample_numbers)]

    def complete(self, fields: Batch) -> Batch:
        """Fill in the other fields from `text`; the batch that they are."""
        arrays = {name: tensor.numpy() for name, tensor in fields.items()}
        text, tokens = arrays.pop("text"), arrays["tokens"]
        text, sources = text[:len(tokens)], text[len(tokens):].reshape(-1)
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
        if self.source_names:
            np.copyto(arrays["source"], sources[:len(tokens)])
        return {name: fields[name] for name in arrays}

    def outline(self) -> NextToken:
        """The same without its samples: what a rank needs that is told `text` by another. It can be pickled."""
        return NextToken(Absent(len(self.samples), self.seq_len), self.eod_id, self.reset_at_eod, self.eod_mask_loss, self.vocab_size,
                         source_names=self.source_names)

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


def datasets(run, num_train: int, num_valid: int, goes_on: bool = True) -> tuple[NextToken, dict[str, NextToken]]:
    """The training set with at least num_train samples and the validation sets with num_valid each, as run.data says.

    A run that goes on reads each source in the order in which it began; goes_on=False is for what is only measured, at another length maybe. Raises DataError for missing or broken corpora, too few tokens, a
    tokenizer that is larger than the model's vocabulary, and a mixture that contradicts what the run has read (ledger.py).
    """
    data, seq_len, seed = run.data, run.train.seq_len, run.run.seed
    cache = data.cache_dir or str(Path(run.run.dir) / "index_cache")
    is_mixture = bool(data.phases or data.replay or data.max_epochs)
    num_plain = 0 if is_mixture else num_train
    if data.split:
        train, valid, _ = build_pretraining(data.train, data.split, seq_len, (num_plain, num_valid, 0), seed, cache, data.one_epoch, data.storage)
        named = {"valid": valid} if num_valid else {}
    else:
        train, _, _ = build_pretraining_per_split((data.train, None, None), seq_len, (num_plain, 0, 0), seed, cache, data.one_epoch, data.storage)
        named = {name: build_pretraining_per_split((None, blend, None), seq_len, (0, num_valid, 0), seed, cache, storage=data.storage)[1]
                 for name, blend in data.valid.items()} if num_valid else {}
    if is_mixture:
        train = build_mixture(data, seq_len, num_train, seed, cache)
        _tell_departures(train, run.train)
    before, is_same_run = history(run) if goes_on else (None, True)
    if before:
        train = kept(train, before["orders"], num_train, cache)
    for name, samples, wanted in (("data.train", train, num_train), *((f"data.valid.{n}", s, num_valid) for n, s in named.items())):
        if len(samples) < wanted:
            raise DataError(f"{name} holds {len(samples)} samples of {seq_len} tokens in one pass, but {wanted} are asked for; "
                            "lower train.steps or train.eval_samples, or give weights, which allow several epochs")
    train, valid = _next_tokens(run, train, named)
    if before:
        Ledger(train).check(before, is_same_run)
    return train, valid


def _next_tokens(run, train, named) -> tuple[NextToken, dict[str, NextToken]]:
    """The sets as batches of tokens. What they call sources is one list for all, because all ranks and batches must name the same ones."""
    data, eod_id = run.data, _eod_id(run)
    options = dict(eod_id=eod_id, reset_at_eod=data.reset_at_eod, eod_mask_loss=data.eod_mask_loss, vocab_size=run.model.vocab_size,
                   num_threads=data.threads)
    fim = _fim(run, eod_id) if data.fim.rate else None
    told = ([train] if data.train_by_source else []) + (list(named.values()) if data.valid_by_source else [])
    names = list(dict.fromkeys(name for samples in told for name in names_of(samples)))
    sets = {name: NextToken(samples, **options, fim=fim if data.fim.valid else None, source_names=names if data.valid_by_source else ())
            for name, samples in named.items()}
    return NextToken(train, **options, fim=fim, source_names=names if data.train_by_source else ()), sets


def _fim(run, eod_id: int | None) -> FillMiddle:
    fim, tokens = run.data.fim, {"prefix_id", "middle_id", "suffix_id"}
    if eod_id is None or eod_id in (fim.prefix_id, fim.middle_id, fim.suffix_id):
        raise DataError(f"data.fim needs an end-of-document token that is none of {', '.join(sorted(tokens))}, but data.tokenizer={run.data.tokenizer} "
                        f"has {eod_id}; set data.eod_id")
    return FillMiddle(**fim.model_dump(include={"rate", "spm_rate"} | tokens), eod_id=eod_id, seed=run.run.seed)


def _tell_departures(mixture: Mixture, train) -> None:
    """Caps that this run reaches, before it begins."""
    for k, at in mixture.departures[:MANY]:
        source = mixture.datasets[k]
        samples = int(mixture.counts(at)[k])
        log.info(f"{source.corpus.prefix} reaches its cap of {samples} samples ({samples * source.seq_len / source.tokens_per_epoch:.3g} epochs) at sample "
                 f"{at - 1} (step {schedule.step_of_sample(at - 1, train)}); from sample {at} on the others go on without it")
    if len(mixture.departures) > MANY:
        log.info(f"and {len(mixture.departures) - MANY} more reach their caps later")


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
