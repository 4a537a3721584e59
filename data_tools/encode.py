"""A block of raw documents to token ids: what a worker process of preprocess.py does.

In: a Block of the reader. Out: Encoded, flat arrays of the ids of each key with the lengths of the documents, the line of each
document, where tokens begin if that is kept, and what could not be read. Nothing here touches a file of the output.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread

import numpy as np

from data_tools.cli import UsageError
from data_tools.fast import FastTokenizer, NoFastPath
from data_tools.origins import pack_starts
from data_tools.reader import Block, Position, Problem, parse_block
from data_tools.tokenizer import Tokenizer, load_tokenizer, starts_from_bytes
from engine.data.indexed import optimal_dtype


@dataclass(frozen=True)
class Options:
    """What decides the ids. All of it can be sent to another process."""

    tokenizer: str
    json_keys: tuple[str, ...]
    append_eod: bool
    keep_offsets: bool
    is_fast: bool


@dataclass(frozen=True)
class Column:
    """The documents of one key: ids laid end to end, and, where positions are kept, packed steps and their bytes per document."""

    tokens: np.ndarray
    lengths: np.ndarray
    """int32 [documents]; 0 for an empty one."""
    steps: bytes = b""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Encoded:
    """A block's documents as tokens. lines: int64 [documents]. no_fast_path: why the reference was used, None where it was not asked."""

    path: str
    next: Position
    num_bytes: int
    lines: np.ndarray
    columns: list[Column]
    problems: list[Problem]
    no_fast_path: str | None


class Encoder:
    """Parses and tokenises blocks; one per process. Raises NoFastPath when the fast path gives other ids: start again without it.

    tokenizer: what the process that writes has loaded already; None in a worker.
    """

    def __init__(self, options: Options, tokenizer: Tokenizer | None = None) -> None:
        if tokenizer is None and parent_process() is not None:
            end_with_parent()
        self.options = options
        self.tokenizer = tokenizer or load_tokenizer(options.tokenizer)
        self.dtype = optimal_dtype(self.tokenizer.vocab_size)
        check_eod(options, self.tokenizer)
        self.no_fast_path: str | None = None
        self.fast: FastTokenizer | None = None
        if options.is_fast and options.tokenizer != "bytes":
            try:
                if options.keep_offsets and self.tokenizer.byte_lengths is None:
                    raise NoFastPath("positions of tokens come from the tokenizer's own library here")
                self.fast = FastTokenizer(options.tokenizer, self.tokenizer)
            except NoFastPath as error:
                self.no_fast_path = str(error)

    def __call__(self, block: Block) -> Encoded:
        lines, texts, problems = parse_block(block, self.options.json_keys)
        columns = [self._column(column) for column in texts]
        return Encoded(block.path, block.next, block.num_bytes, np.array(lines, dtype=np.int64), columns, problems, self.no_fast_path)

    def _column(self, texts: list[str]) -> Column:
        if not texts:
            return Column(np.zeros(0, self.dtype), np.zeros(0, np.int32))
        starts = None
        if self.options.keep_offsets and self.tokenizer.byte_lengths is None:
            rows, starts = zip(*map(self.tokenizer.encode_starts, texts))
            flat, lengths = _flatten(rows)
            starts = [np.asarray(row, dtype=np.int64) for row in starts]
        else:
            flat, lengths = self.fast.encode(texts) if self.fast else _flatten(self.tokenizer.encode_rows(texts))
            if self.options.keep_offsets:
                starts = self._starts(texts, flat, lengths)
        if flat.size and int(flat.max()) >= self.tokenizer.vocab_size:
            raise NoFastPath(f"id {flat.max()} is outside the vocabulary of {self.tokenizer.vocab_size}")
        flat = flat.astype(self.dtype, copy=False)
        steps, sizes = b"", np.zeros(0, dtype=np.int64)
        if self.options.append_eod:
            if starts is not None:
                starts = [np.append(row, len(text)) if len(row) else row for row, text in zip(starts, texts)]
            flat, lengths = _with_ending(flat, lengths, self.tokenizer.eod_id)
        if starts is not None:
            steps, sizes = pack_starts(np.concatenate(starts), lengths)
        return Column(flat, lengths.astype(np.int32), steps, sizes)

    def _starts(self, texts: list[str], flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Where tokens begin, from the bytes each stands for; from the library where an added token has swallowed spaces."""
        starts = []
        for text, ids in zip(texts, np.split(flat, np.cumsum(lengths)[:-1])):
            byte_lengths = self.tokenizer.byte_lengths[ids]
            if byte_lengths.sum() == (len(text) if text.isascii() else len(text.encode("utf-8"))):
                starts.append(starts_from_bytes(text, byte_lengths))
            else:
                starts.append(np.asarray(self.tokenizer.encode_starts(text)[1], dtype=np.int64))
        return starts


def end_with_parent() -> None:
    """Makes a worker process end when the one that writes is killed, and leave Ctrl-C, which reaches both, to it."""
    signal(SIGINT, SIG_IGN)
    parent = parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def check_eod(options: Options, tokenizer: Tokenizer) -> None:
    """Raises UsageError when an ending is asked of a tokenizer that has none."""
    if options.append_eod and tokenizer.eod_id is None:
        raise UsageError(
            f"--append-eod: tokenizer {options.tokenizer!r} names no end-of-document token; add eos_token to its tokenizer_config.json"
        )


def _flatten(rows) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if isinstance(rows[0], np.ndarray):
        return np.concatenate(rows), lengths
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum())), lengths


def _with_ending(flat: np.ndarray, lengths: np.ndarray, ending: int) -> tuple[np.ndarray, np.ndarray]:
    """Appends `ending` to every document that has tokens."""
    is_full = lengths > 0
    lengths = lengths + is_full
    longer = np.empty(int(lengths.sum()), flat.dtype)
    at = np.cumsum(lengths)[is_full] - 1
    is_token = np.ones(longer.size, dtype=bool)
    is_token[at] = False
    longer[at] = ending
    longer[is_token] = flat
    return longer, lengths
