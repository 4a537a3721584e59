"""Whole records in and out: what the tools from text to text read and write.

In: blocks of the reader. A record is the line of JSON as it stands in the file and its text, so that what is kept is written byte
for byte, with all its other fields; Parquet rows and text files become such lines. Out: one JSON-lines file, plain, .gz or
.zst, which appears under its name only when it is complete.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_tools.cli import UsageError
from data_tools.files import need
from data_tools.options import OUTPUT_SUFFIXES
from data_tools.reader import Block, Problem, column_values, parse_block
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


def records_of(block: Block, json_key: str) -> tuple[list[Record], list[Problem]]:
    """The records of a block in order, and what could not be read."""
    lines, (texts,), problems = parse_block(block, [json_key])
    raw = dict(raw_lines(block, json_key))
    return [Record(block.path, line, raw[line], text) for line, text in zip(lines, texts)], problems


def raw_lines(block: Block, json_key: str) -> Iterator[tuple[int, bytes]]:
    """(line number, line of JSON) of a block; nothing is parsed, so malformed ones are among them, but blank ones are not."""
    if block.kind == "jsonl":
        for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
            if line := line.strip():
                yield number, line.removeprefix(BYTE_ORDER_MARK)
    elif block.kind == "text":
        yield 1, orjson.dumps({json_key: block.data.decode("utf-8-sig", "replace")})
    else:
        names = block.data.schema.names
        for number, row in enumerate(zip(*(column_values(block, name) for name in names)), start=block.first_line):
            yield number, orjson.dumps(dict(zip(names, row)), default=_plain)


def with_text(raw: bytes, key: str, text: str) -> bytes:
    """The record with another text; its other fields stay what they are, for which json is used: it knows NaN and integers beyond 64 bits."""
    return json.dumps(json.loads(raw) | {key: text}, ensure_ascii=False).encode()


def _plain(value: object) -> object:
    """What JSON has no type for, as text: decimals, durations, bytes, and bytes that a column calls text."""
    if isinstance(value, UnicodeDecodeError):
        value = value.object
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def total_size(paths: Sequence[str]) -> int:
    """Bytes of the files on disk."""
    return sum(os.stat(path).st_size for path in paths)


def report_problems(problems: list[Problem], on_error: str, num_before: int) -> None:
    """Names malformed documents on stderr. Raises DataError at the first when on_error is "stop"."""
    if problems and on_error == "stop":
        raise DataError(
            f"{len(problems)} malformed documents, the first at {problems[0]}; "
            "nothing was written: mend them, or leave them out with --on-error skip"
        )
    for problem in problems[: max(0, MAX_LISTED - num_before)]:
        print(problem, file=sys.stderr)


def check_output(path: str, others: Sequence[str], option: str = "--output") -> None:
    """Raises UsageError for a name that says no format, or that is one of the other files; DataError where .zst cannot be written."""
    if not path.lower().endswith(OUTPUT_SUFFIXES):
        raise UsageError(f"{option} {path}: the name must end in one of {', '.join(OUTPUT_SUFFIXES)}")
    if os.path.realpath(path) in map(os.path.realpath, others):
        raise UsageError(f"{option} {path} is already the name of an input or output; choose another")
    if path.lower().endswith(".zst"):
        need("zstandard", f"{path} is to be compressed with zstd")


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
    import zstandard

    return zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
