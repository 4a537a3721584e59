"""The unfinished output of preprocess.py: a folder beside the output, from which an interrupted run goes on.

In: Encoded blocks in input order. While the run goes, FOLDER holds the tokens, lengths and lines so far, and state.json, which says
what they are made from (names, sizes and times of files, options, tokenizer) and how far they are valid: sizes of the files and
the position in the input. A piece is what lies between two states; the files are on disk before the state that counts them.
Going on cuts the files to those sizes. Out: PREFIX_KEY_document.bin, .idx and .origins for each key, under those names only when all
is complete; a run killed while it names them names the rest the next time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.encode import Encoded
from data_tools.origins import OriginsWriter
from data_tools.reader import Position
from engine.data.indexed import DTYPE_CODES, MAGIC, VERSION, DataError

PIECE_BYTES = 256 << 20  # of input, or
PIECE_SECONDS = 10.0  # whichever comes first: so much is done again after a kill
COUNTS = ("documents", "empty", "malformed", "bytes", "tokens")
ROWS = 1 << 20  # documents of which an index is written at a time


class Work:
    """One unfinished output. Only one process at a time has it."""

    def __init__(self, output_prefix: str, keys: tuple[str, ...], dtype: np.dtype, keep_offsets: bool, identity: dict) -> None:
        if not os.path.basename(output_prefix):
            raise DataError(f"output prefix {output_prefix!r} names a folder; add a file name, for example {output_prefix}corpus")
        self.prefixes = [f"{output_prefix}_{key}_document" for key in keys]
        self.report = Path(f"{output_prefix}_report.jsonl")
        self.folder = Path(f"{output_prefix}.unfinished")
        self.dtype, self.keep_offsets, self.identity = dtype, keep_offsets, identity
        self._files: dict = {}
        per_key = ("bin", "lengths", "steps", "sizes") if keep_offsets else ("bin", "lengths")
        self._names = [f"{k}.{part}" for k in range(len(keys)) for part in per_key] + ["lines", "files", "problems"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}; choose an output prefix in a writable folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{self.folder} is in use by another run with this output; wait for it, or choose another --output-prefix") from None
        self.state = self._read_state()
        self.started_anew = self.state is None and (self.folder / "state.json").exists()
        if self.state is None:
            self.clear()
        self._open()

    def _read_state(self) -> dict | None:
        """The last state, None where there is none or it was made from something else."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if state.get("identity") == json.loads(json.dumps(self.identity)) else None

    def clear(self) -> None:
        """Forgets everything that was done."""
        self.close()
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        self.state = {"identity": self.identity, "position": Position(), "sizes": {}, "is_complete": False, **dict.fromkeys(COUNTS, 0)}
        self._open()

    def _open(self) -> None:
        self.close()
        self._since_bytes, self._since = 0, time.monotonic()
        if self.state["is_complete"]:
            return
        for name in self._names:
            self._files[name] = open(self.folder / name, "ab", buffering=1 << 20)
            size = self.state["sizes"].get(name, 0)
            if os.fstat(self._files[name].fileno()).st_size < size:
                raise DataError(f"{self.folder / name} is shorter than state.json says; remove {self.folder} and start again")
            self._files[name].truncate(size)

    @property
    def has_pieces(self) -> bool:
        """Whether something would be lost with the folder."""
        return bool(self.state["sizes"])

    def append(self, encoded: Encoded) -> None:
        """Adds a block; every so often what was added is made safe."""
        for k, column in enumerate(encoded.columns):
            self._files[f"{k}.bin"].write(column.tokens.data if column.tokens.size else b"")
            self._files[f"{k}.lengths"].write(column.lengths.tobytes())
            if self.keep_offsets:
                self._files[f"{k}.steps"].write(column.steps)
                self._files[f"{k}.sizes"].write(column.sizes.astype(np.int32).tobytes())
        if encoded.lines.size and int(encoded.lines.max()) >= 2**32:
            raise DataError(f"{encoded.path}: more than {2**32 - 1} lines; split the file")
        self._files["lines"].write(encoded.lines.astype(np.uint32).tobytes())
        self._files["files"].write(json.dumps([encoded.path, int(encoded.lines.size)]).encode() + b"\n")
        empty = encoded.lines[np.all([column.lengths == 0 for column in encoded.columns], axis=0)]
        entries = [(problem.path, problem.line, problem.reason, False) for problem in encoded.problems]
        for entry in entries + [(encoded.path, int(line), "empty document", True) for line in empty]:
            record = json.dumps(dict(zip(("file", "line", "reason", "kept"), entry)), ensure_ascii=False)
            self._files["problems"].write(record.encode("utf-8", "surrogateescape") + b"\n")  # a name of a file may be no UTF-8
        added = (int(encoded.lines.size), int(empty.size), len(encoded.problems), encoded.num_bytes, sum(c.tokens.size for c in encoded.columns))
        for name, number in zip(COUNTS, added):
            self.state[name] += number
        self.state["position"] = encoded.next
        self._since_bytes += encoded.num_bytes
        if self._since_bytes >= PIECE_BYTES or time.monotonic() - self._since >= PIECE_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes all that was appended safe: files first, then the state that counts them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state["sizes"] = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        self._write_state()
        self._since_bytes, self._since = 0, time.monotonic()

    def _write_state(self) -> None:
        with open(self.folder / "state.json.tmp", "w", encoding="utf-8") as file:
            file.write(json.dumps(self.state, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / "state.json.tmp", self.folder / "state.json")

    def finish(self) -> list[str]:
        """Gives the output its names and returns them. The folder stays: until it is removed, all this can be done again."""
        if not self.state["is_complete"]:
            for file in self._files.values():
                file.flush()
            for k in range(len(self.prefixes)):
                self._write_index(k)
                self._write_origins(k)
            self.state["is_complete"] = True
            self.commit()
        self.close()
        names = {}
        for k, prefix in enumerate(self.prefixes):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            names |= {f"{k}.bin": f"{prefix}.bin", f"{k}.origins": f"{prefix}.origins", f"{k}.idx": f"{prefix}.idx"}
            if (self.folder / f"{k}.bin").exists():
                # The .idx goes first and comes last: at no moment do two files of different corpora stand side by side.
                Path(f"{prefix}.idx").unlink(missing_ok=True)
                Path(f"{prefix}.manifest.json").unlink(missing_ok=True)
        for name, path in names.items():
            if (self.folder / name).exists():
                os.replace(self.folder / name, path)
        if self.state["malformed"] or self.state["empty"]:
            names["problems"] = str(self.report)
            if (self.folder / "problems").exists():
                os.replace(self.folder / "problems", self.report)
        else:
            self.report.unlink(missing_ok=True)
        return list(names.values())

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        self.close()
        shutil.rmtree(self.folder)
        self._lock.close()

    def close(self) -> None:
        """Closes the files; what was not made safe may be lost."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _lengths(self, k: int) -> Iterator[np.ndarray]:
        with open(self.folder / f"{k}.lengths", "rb") as file:
            while block := file.read(4 * ROWS):
                yield np.frombuffer(block, dtype=np.int32)

    def _write_index(self, k: int) -> None:
        """Megatron's index: an empty document is one without a sequence."""
        num_sequences = sum(int(np.count_nonzero(lengths)) for lengths in self._lengths(k))
        with open(self.folder / f"{k}.idx", "wb", buffering=1 << 20) as file:
            file.write(MAGIC + struct.pack("<QBQQ", VERSION, DTYPE_CODES[self.dtype.name], num_sequences, self.state["documents"] + 1))
            for lengths in self._lengths(k):
                file.write(lengths[lengths > 0].tobytes())
            before = 0
            for lengths in self._lengths(k):
                ends = before + np.cumsum(lengths[lengths > 0], dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate([[before], ends[:-1]]).astype(np.int64).tobytes() if ends.size else b"")
                before = int(ends[-1]) if ends.size else before
            before = 0
            file.write(bytes(8))
            for lengths in self._lengths(k):
                file.write((before + np.cumsum(lengths > 0, dtype=np.int64)).tobytes())
                before += int(np.count_nonzero(lengths))
            file.flush()
            os.fsync(file.fileno())

    def _write_origins(self, k: int) -> None:
        """Lines of the documents that are sequences, and where their tokens begin if that is kept."""
        writer = OriginsWriter(self.folder / str(k), self.keep_offsets)
        arrays = [open(self.folder / name, "rb") for name in (["lines", f"{k}.lengths"] + ([f"{k}.sizes", f"{k}.steps"] if self.keep_offsets else []))]
        try:
            with open(self.folder / "files", "rb") as file:
                for path, num_documents in map(json.loads, file):
                    lines, lengths = (np.frombuffer(source.read(4 * num_documents), np.uint32) for source in arrays[:2])
                    steps, sizes = b"", ()
                    if self.keep_offsets:
                        sizes = np.frombuffer(arrays[2].read(4 * num_documents), np.int32)
                        steps = arrays[3].read(int(sizes.sum()))
                        sizes = sizes[lengths > 0]
                    writer.add(path, lines[lengths > 0], steps, sizes)
            writer.finalize()
        finally:
            writer.abort()
            for source in arrays:
                source.close()
