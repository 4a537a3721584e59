"""Documents out of input files: JSON lines (one document per line) or plain text (one document per file), each maybe .gz.

In: paths. Out: chunks of raw lines, cheap to read and to send to another process, which parse() turns into texts; whatever
cannot be read as a document becomes a Problem with its file and line, so that documents in = documents out + problems.
Blank lines are no documents. Left out: parquet, zstd, HTML and other formats that need extracting.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.cli import UsageError
from engine.data.indexed import DataError

JSONL_SUFFIXES = {".jsonl", ".json", ".ndjson"}
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py"}
CHUNK_BYTES = 1 << 20  # large enough to hide the cost of sending, small enough to keep every worker busy


@dataclass(frozen=True)
class Chunk:
    """Raw documents of one file; lines[i] is line line_numbers[i], or the whole file when is_json is False."""

    path: str
    is_json: bool
    line_numbers: list[int]
    lines: list[bytes]


@dataclass(frozen=True)
class Problem:
    """One document that was not used, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def input_format(path: str, override: str = "auto") -> str:
    """ "jsonl" or "text", by suffix (.gz set aside) unless override names one. Raises UsageError for other suffixes."""
    if override != "auto":
        return override
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = [suffix for suffix in suffixes if suffix != ".gz"][-1:]
    if kind and kind[0] in JSONL_SUFFIXES:
        return "jsonl"
    if kind and kind[0] in TEXT_SUFFIXES:
        return "text"
    raise UsageError(f"{path}: cannot tell the format by its name; add --format jsonl (a document per line) or --format text (one document)")


def read_chunks(paths: Sequence[str], override: str = "auto") -> Iterator[Chunk]:
    """The input files as chunks, in order. Raises DataError for files that are missing or a damaged .gz."""
    for path in paths:
        is_json = input_format(path, override) == "jsonl"
        try:
            with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
                if is_json:
                    yield from _chunks_of_lines(path, file)
                else:
                    yield Chunk(path, False, [1], [file.read()])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); fetch or compress it again") from None


def _chunks_of_lines(path: str, file) -> Iterator[Chunk]:
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        numbers.append(number)
        lines.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield Chunk(path, True, numbers, lines)
            numbers, lines, size = [], [], 0
    if lines:
        yield Chunk(path, True, numbers, lines)


def parse(chunk: Chunk, json_key: str) -> tuple[list[tuple[int, str]], list[Problem]]:
    """([(line number, text)], malformed documents) of a chunk."""
    texts, problems = [], []
    for number, line in zip(chunk.line_numbers, chunk.lines):
        try:
            texts.append((number, _text_of(line, json_key) if chunk.is_json else line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            problems.append(Problem(chunk.path, number, _reason(error)))
    return texts, problems


def _text_of(line: bytes, json_key: str) -> str:
    record = json.loads(line.rstrip().decode("utf-8-sig"))  # the first line of a file may begin with a byte order mark
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with the key {json_key!r}")
    if json_key not in record:
        raise ValueError(f"no key {json_key!r} among {', '.join(map(repr, record)) or 'no keys'}; choose another with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(f"{json_key!r} is a {type(text).__name__}, expected a string")
    text.encode("utf-8")  # a lone surrogate escape passes the JSON parser and fails here
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"not Unicode text: a lone surrogate at character {error.start}"
    return str(error)
