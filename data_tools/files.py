"""Input files by name and as bytes: which files an input means, what format a name says, and blocks of what a file holds, uncompressed.

In: what a user gave as --input: files, folders, globs. Out: paths, and large blocks of bytes of plain, .gz and .zst files, from any
place on. Damaged and cut-short compressed files are errors, never a shorter file. Left out: object stores; other compressions.
"""

from __future__ import annotations

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.cli import UsageError
from engine.data.indexed import DataError

JSONL_SUFFIXES = {".jsonl", ".json", ".ndjson"}
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py"}
COMPRESSED = {".gz", ".zst"}
OUR_NOTES = (".manifest.json", "_report.jsonl")  # what our tools write beside their outputs; in a folder they are no documents


def input_format(path: str, override: str = "auto") -> str:
    """ "jsonl", "text" or "parquet", by suffix (.gz and .zst set aside) unless override names one. Raises UsageError for other suffixes."""
    if override != "auto":
        return override
    kind = _kind(path)
    if kind is None:
        raise UsageError(
            f"{path}: cannot tell the format by its name; add --format jsonl (a document per line), text (one document) or parquet (a document per row)"
        )
    return kind


def _kind(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    last = [suffix for suffix in suffixes if suffix not in COMPRESSED][-1:]
    if last == [".parquet"]:
        return "parquet"
    if last and last[0] in JSONL_SUFFIXES:
        return "jsonl"
    return "text" if last and last[0] in TEXT_SUFFIXES else None


def expand(inputs: Sequence[str], override: str = "auto") -> list[str]:
    """Files of the inputs, in their order: a file is itself, a glob its matches, a folder the documents anywhere under it, both sorted.

    In a folder hidden files are passed over, and manifests, reports and files of other kinds too, with a word on stderr, unless override names a format.
    Raises UsageError for a glob without a match and for a folder without documents, DataError for a file that is missing.
    """
    paths: list[str] = []
    for given in map(str, inputs):
        if os.path.isdir(given):
            paths += _files_under(given, override)
        elif os.path.exists(given):
            paths.append(given)
        elif glob.has_magic(given):
            files = []
            for match in sorted(glob.glob(given, recursive=True)):
                if not os.path.isdir(match):
                    files.append(match)
                elif "**" not in given:  # with ** the files of a folder are matches themselves
                    files += _files_under(match, override)
            if not files:
                raise UsageError(f"{given}: no file matches; check the pattern, and quote it so that the shell leaves it alone")
            paths += files
        else:
            raise DataError(f"{given}: no such file; check the path")
    for path in paths:
        input_format(path, override)  # all names are judged before any work is done
    return paths


def _files_under(folder: str, override: str) -> list[str]:
    found, others = [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = os.path.join(parent, name)
                is_document = override != "auto" or (_kind(path) and not name.endswith(OUR_NOTES))
                (found if is_document else others).append(path)
    if others:
        print(f"{folder}: {len(others)} files of other kinds were left out, the first {others[0]}; --format takes them", file=sys.stderr)
    if not found:
        known = ", ".join(sorted(JSONL_SUFFIXES | TEXT_SUFFIXES | {".parquet"}))
        raise UsageError(f"{folder}: the folder holds no documents ({known}); name a --format")
    return found


def read_bytes(path: str, skip: int, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(block, bytes read from disk for it) of a file, uncompressed, without its first `skip` bytes."""
    suffix = Path(path).suffix.lower()
    with open(path, "rb", buffering=0) as file:
        if suffix not in COMPRESSED:
            file.seek(skip)
            while block := file.read(block_bytes):
                yield block, len(block)
            return
        before = 0
        for block in _gunzip(path, file, block_bytes) if suffix == ".gz" else _unzstd(path, file, block_bytes):
            disk_bytes, before = file.tell() - before, file.tell()
            yield block[skip:], disk_bytes
            skip = max(0, skip - len(block))


def _damaged(path: str, error: object) -> DataError:
    return DataError(f"{path}: the compressed file is damaged or cut short ({error}); fetch or compress it again")


def _gunzip(path: str, file, block_bytes: int) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as opened:
            while block := opened.read(block_bytes):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None


def _unzstd(path: str, file, block_bytes: int) -> Iterator[bytes]:
    zstandard = need("zstandard", f"{path} is compressed with zstd")
    # Not the library's stream_reader: at a file that is cut short it ends as if the file were whole.
    frame, has_begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while data := file.read(block_bytes // 8 or 1):  # what it unpacks to is several times as much
            while data:
                block, has_begun = frame.decompress(data), True
                yield from (block[i : i + block_bytes] for i in range(0, len(block), block_bytes))
                data = b""
                if frame.eof:
                    data, frame, has_begun = frame.unused_data, zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from None
    if has_begun:
        raise _damaged(path, "it ends inside a frame")


def need(module: str, why: str):
    """An optional library. Raises DataError with the command that installs it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        cure = f"pip install -c constraints.txt {package}, or the extra: pip install -e '.[data]'"
        raise DataError(f"{why}, which needs {package}: {cure}") from None
