"""Documents out of input files: JSON lines, Parquet rows, or plain text (one document per file), the first and last maybe .gz or .zst.

read_blocks() reads files in large pieces that are cheap to read and to send to another process, and know where the next begins, so
that reading can go on from there; parse_block() turns one into texts with their lines, in the process that uses them. read_chunks()
and parse() are the same with the raw line of every document at hand, for tools that copy lines. Whatever cannot be read as a document
becomes a Problem with its file and line, so that documents in = documents out + problems. Blank lines are no documents.
Left out: HTML, PDF and other formats that need extracting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from data_tools.files import expand, input_format, need, read_bytes
from engine.data.indexed import DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Block", "Chunk", "Position", "Problem", "expand", "input_format", "parse", "parse_block", "read_blocks", "read_chunks"]

CHUNK_BYTES = 1 << 20  # large enough to hide the cost of sending, small enough to keep every worker busy


class Position(NamedTuple):
    """Where reading goes on: a file of the list, bytes (of the uncompressed file) or rows before it, and the line or row to come."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Block:
    """Documents of one file that follow one another, unparsed. kind: "jsonl" or "text" (data: bytes), or "parquet" (an Arrow batch)."""

    path: str
    kind: str
    first_line: int
    data: bytes | pyarrow.RecordBatch
    next: Position
    num_bytes: int
    """Bytes of the file on disk that it accounts for: what a progress bar counts."""


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


def read_blocks(paths: Sequence[str], override: str = "auto", columns: Sequence[str] | None = None, start: Position = Position()) -> Iterator[Block]:
    """The input files as blocks, in order, from `start` on. columns: what is read of Parquet files (None: all).

    Raises DataError for files that are missing, damaged or cut short.
    """
    for i in range(start.file, len(paths)):
        begin = start if i == start.file else Position(i)
        kind = input_format(paths[i], override)
        if kind == "parquet":
            yield from _rows(paths[i], columns, begin)
        elif kind == "jsonl":
            yield from _lines(paths[i], begin)
        else:
            data = b"".join(block for block, _ in read_bytes(paths[i], 0, CHUNK_BYTES))
            yield Block(paths[i], "text", 1, data, Position(i + 1), os.stat(paths[i]).st_size)


def _lines(path: str, begin: Position) -> Iterator[Block]:
    """Blocks cut behind their last line break; what follows it begins the next."""
    held: list[bytes] = []
    at, line, num_bytes = begin.offset, begin.line, 0
    for block, disk_bytes in read_bytes(path, begin.offset, CHUNK_BYTES):
        num_bytes += disk_bytes
        cut = block.rfind(b"\n") + 1
        if not cut:
            held.append(block)  # a line longer than a block
            continue
        data = b"".join([*held, memoryview(block)[:cut]])
        held = [block[cut:]]
        at, num_lines = at + len(data), data.count(b"\n")
        yield Block(path, "jsonl", line, data, Position(begin.file, at, line + num_lines), num_bytes)
        line, num_bytes = line + num_lines, 0
    yield Block(path, "jsonl", line, b"".join(held), Position(begin.file + 1), num_bytes)


def _rows(path: str, columns: Sequence[str] | None, begin: Position) -> Iterator[Block]:
    """Rows in batches of about CHUNK_BYTES; only the row group that is read is in memory."""
    parquet = need("pyarrow.parquet", f"{path} is a Parquet file")
    from pyarrow import ArrowException, RecordBatch

    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({error}); fetch it again") from None
    with file:
        for column in columns or ():
            if column not in file.schema_arrow.names:
                raise DataError(f"{path}: no column {column!r} among {', '.join(map(repr, file.schema_arrow.names))}; choose another with --json-key")
        num_rows, row, disk_bytes = file.metadata.num_rows, begin.offset, os.stat(path).st_size
        for group, drop in _groups_from(file.metadata, row):
            try:
                for batch in _batches(file, group, columns, drop):
                    after = row + batch.num_rows
                    position = Position(begin.file, after, after + 1) if after < num_rows else Position(begin.file + 1)
                    yield Block(path, "parquet", row + 1, batch, position, disk_bytes * after // num_rows - disk_bytes * row // num_rows)
                    row = after
            except (ArrowException, OSError) as error:
                raise DataError(f"{path}: row group {group} is damaged ({error}); write the file again") from None
        if num_rows == 0:
            yield Block(path, "parquet", 1, RecordBatch.from_pylist([], file.schema_arrow), Position(begin.file + 1), disk_bytes)


def _groups_from(metadata, row: int) -> Iterator[tuple[int, int]]:
    """(row group, rows of it before `row`) of those that hold `row` and later ones."""
    before = 0
    for group in range(metadata.num_row_groups):
        if before + metadata.row_group(group).num_rows > row:
            yield group, max(0, row - before)
        before += metadata.row_group(group).num_rows


def _batches(file, group: int, columns: Sequence[str] | None, drop: int) -> Iterator[pyarrow.RecordBatch]:
    metadata = file.metadata.row_group(group)
    bytes_per_row = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    for batch in file.iter_batches(max(1, CHUNK_BYTES // bytes_per_row), row_groups=[group], columns=list(columns) if columns else None):
        kept, drop = batch.slice(drop), max(0, drop - batch.num_rows)
        if kept.num_rows:
            yield kept


def parse_block(block: Block, json_keys: Sequence[str]) -> tuple[list[int], list[list[str]], list[Problem]]:
    """(lines, texts of each key, malformed documents). A document in which one key is wrong is left out of all of them."""
    lines: list[int] = []
    texts: list[list[str]] = [[] for _ in json_keys]
    problems: list[Problem] = []
    for line, record in _records(block, json_keys, problems):
        try:
            found = [record] * len(json_keys) if block.kind == "text" else [_checked(record, key) for key in json_keys]
        except ValueError as error:
            problems.append(Problem(block.path, line, _reason(error)))
            continue
        lines.append(line)
        for column, text in zip(texts, found):
            column.append(text)
    return lines, texts, problems


def _records(block: Block, json_keys: Sequence[str], problems: list[Problem]) -> Iterator[tuple[int, object]]:
    """(line, JSON value, row or text) of every document that can be read at all; the others go to problems."""
    if block.kind == "parquet":
        rows = zip(*(column_values(block, key) for key in json_keys))
        yield from ((line, dict(zip(json_keys, row))) for line, row in enumerate(rows, start=block.first_line))
        return
    from orjson import JSONDecodeError, loads

    for line, raw in enumerate([block.data] if block.kind == "text" else block.data.split(b"\n"), start=block.first_line):
        try:
            try:
                record = raw.decode("utf-8-sig") if block.kind == "text" else loads(raw)
            except JSONDecodeError:
                if not raw.strip():
                    continue
                record = _slow_loads(raw)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(block.path, line, _reason(error)))
            continue
        yield line, record


def column_values(block: Block, name: str) -> list:
    """The values of a Parquet column. Nothing checks texts when they are written: one that is no UTF-8 stands as the error that it raises.

    Raises DataError where such a text lies inside a list or a record.
    """
    column = block.data.column(name)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if column.type.num_fields:
            raise DataError(f"{block.path}: column {name!r}, {column.type}, holds text that is no UTF-8; write the file again") from None
        return list(map(_value, column))


def _value(scalar: pyarrow.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _slow_loads(raw: bytes) -> object:
    """For what orjson refuses: NaN, great numbers and a byte order mark are fine, and json's reasons for the rest are better."""
    return json.loads(raw.rstrip().decode("utf-8-sig"))


def read_chunks(paths: Sequence[str], override: str = "auto") -> Iterator[Chunk]:
    """The input files as chunks, in order; rows of Parquet files as lines of JSON. Raises DataError as read_blocks does."""
    from orjson import dumps

    for block in read_blocks(paths, override):
        if block.kind == "text":
            numbered = [(1, block.data)]
        elif block.kind == "jsonl":
            numbered = [(number, raw) for number, raw in enumerate(block.data.split(b"\n"), start=block.first_line) if raw.strip()]
        else:
            numbered = [(number, dumps(row, default=str)) for number, row in enumerate(block.data.to_pylist(), start=block.first_line)]
        if numbered:
            yield Chunk(block.path, block.kind != "text", [number for number, _ in numbered], [raw for _, raw in numbered])


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
    from orjson import JSONDecodeError, loads

    try:
        record = loads(line)
    except JSONDecodeError:
        record = _slow_loads(line)
    return _checked(record, json_key)


def _checked(record: object, json_key: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object with the key {json_key!r}")
    if json_key not in record:
        raise ValueError(f"no key {json_key!r} among {', '.join(map(repr, record)) or 'no keys'}; choose another with --json-key")
    text = record[json_key]
    if isinstance(text, UnicodeDecodeError):
        raise text
    if type(text) is not str:
        raise ValueError(f"{json_key!r} is a {type(text).__name__}, expected a string")
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate escape passes json and fails here
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"not Unicode text: a lone surrogate at character {error.start}"
    return str(error)
