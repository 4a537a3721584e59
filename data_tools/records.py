"""Whole records in and out: what the tools from text to text read and write.

In: input files, as chunks of the reader. A record is the raw line of JSON and its text, so that what is kept is written byte
for byte, with all its other fields; Parquet rows and text files become such lines. Out: one JSON-lines file, plain, .gz or
.zst, which appears under its name only when it is complete.
"""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_tools.cli import UsageError
from data_tools.options import OUTPUT_SUFFIXES
from data_tools.reader import CHUNK_BYTES, Chunk, Problem, parse, read_chunks
from engine.data.indexed import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # it belongs to a file, not to its first record
MAX_LISTED = 1000  # malformed documents named one by one; the rest are counted


@dataclass(frozen=True)
class Record:
    """One document: where it stands, its line of JSON without the newline, its text."""

    path: str
    line: int
    raw: bytes
    text: str


def records_of(chunk: Chunk, json_key: str) -> tuple[list[Record], list[Problem]]:
    """The records of a chunk in order, and what could not be read."""
    texts, problems = parse(chunk, json_key)
    raw = dict(zip(chunk.line_numbers, raw_lines(chunk, json_key)))
    return [Record(chunk.path, number, raw[number], text) for number, text in texts], problems


def raw_lines(chunk: Chunk, json_key: str) -> list[bytes]:
    """The chunk's lines as they are written, without newlines; nothing is parsed, so malformed ones are among them."""
    if chunk.is_json:
        return [line.strip().removeprefix(BYTE_ORDER_MARK) for line in chunk.lines]
    return [orjson.dumps({json_key: line.decode("utf-8-sig", "replace")}) for line in chunk.lines]


def read_record_chunks(paths: Sequence[str], override: str = "auto") -> Iterator[Chunk]:
    """The input files as chunks in order; rows of Parquet files as lines of JSON."""
    for path in paths:
        if path.lower().endswith(".parquet") and override == "auto":
            yield from _parquet_chunks(path)
        else:
            yield from read_chunks([path], override)


def _parquet_chunks(path: str) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 1
            for batch in file.iter_batches(batch_size=1000):
                lines = [orjson.dumps(row, default=_plain) for row in batch.to_pylist()]
                yield Chunk(path, True, list(range(number, number + len(lines))), lines)
                number += len(lines)
    except (pyarrow.ArrowException, TypeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet with rows of JSON types ({error})") from None


def _plain(value: object) -> object:
    """What JSON has no type for, as text: decimals, durations, and bytes that are UTF-8."""
    return value.decode() if isinstance(value, bytes) else str(value)


def known_size(paths: Iterable[str]) -> int | None:
    """Bytes that the chunks of these files will hold in all; None when some are compressed."""
    paths = list(paths)
    sizes = [os.stat(path).st_size for path in paths]  # also tells a missing file before any work is done
    return None if any(path.lower().endswith((".gz", ".zst", ".parquet")) for path in paths) else sum(sizes)


def report_problems(problems: list[Problem], on_error: str, num_before: int) -> None:
    """Names malformed documents on stderr. Raises DataError at the first when on_error is "stop"."""
    if problems and on_error == "stop":
        raise DataError(
            f"{len(problems)} malformed documents, the first at {problems[0]}; "
            "nothing was written: mend them, or leave them out with --on-error skip"
        )
    for problem in problems[: max(0, MAX_LISTED - num_before)]:
        print(problem, file=sys.stderr)


def check_output(path: str, inputs: Sequence[str]) -> None:
    """Raises UsageError for a name that says no format, or that is also an input."""
    if not path.lower().endswith(OUTPUT_SUFFIXES):
        raise UsageError(f"--output {path}: the name must end in one of {', '.join(OUTPUT_SUFFIXES)}")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise UsageError(f"--output {path} is also an input; choose another name")


class RecordWriter:
    """Writes lines of JSON. The file appears under its name, complete, when the context ends without an error."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_documents = self.num_bytes = 0
        self._temporary = f"{path}.tmp{os.getpid()}"

    def __enter__(self) -> RecordWriter:
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb", buffering=1 << 20)
        self._stream = _compressed(self._file, self.path.lower())
        return self

    def write(self, raw: bytes) -> None:
        """Appends one record, given without its newline."""
        self._stream.write(raw + b"\n")
        self.num_documents += 1
        self.num_bytes += len(raw) + 1

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if self._stream is not self._file:
                self._stream.close()
            self._file.flush()
            os.fsync(self._file.fileno())  # renaming first can leave a complete name on an empty file after a power cut
            self._file.close()
            if error_type is None:
                os.replace(self._temporary, self.path)
        finally:
            Path(self._temporary).unlink(missing_ok=True)


def _compressed(file, name: str):
    if name.endswith(".gz"):
        return gzip.GzipFile("", "wb", 6, file, mtime=0)  # no name and no time inside: equal documents give equal bytes
    if not name.endswith(".zst"):
        return file
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{name}: writing .zst needs zstandard: pip install zstandard") from None
    return zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
