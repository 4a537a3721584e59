"""Where each sequence of a corpus came from: PREFIX.origins beside PREFIX.bin and PREFIX.idx.

  origins = Origins.open("data/web_text_document")     # None where the corpus has no such file
  origins.document(7)         # ("raw/web.jsonl.gz", 12): file, and line (or row, from 1) of sequence 7
  origins.token(7, 30)        # ("raw/web.jsonl.gz", 12, 141): and the character of the document's text at which its token 30 begins

One file: magic, length of the header, header (JSON: paths, each path's first sequence, counts), then arrays: uint32 line of each
sequence; and, where token positions were kept, int64 byte pointers and packed steps. A step is the distance between the
characters at which two neighbouring tokens begin, the first counted from 0: one byte below 255, otherwise 255 and four bytes (int32).
So a sequence costs 4 bytes, and a token one byte and a little more. Left out: positions inside a character; a byte-level token
that begins inside one is said to begin at that character.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.data.indexed import DataError

MAGIC = b"TRORIG\x00\x01"
ESCAPE = 255
SUFFIX = ".origins"


class Origins:
    """The origins of an existing corpus, mapped and not read: a look-up costs the same in a small and in a huge one."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        try:
            if self._bytes[:8] != MAGIC:
                raise ValueError("it does not begin like one")
            (size,) = struct.unpack_from("<Q", self._bytes, 8)
            header = json.loads(self._bytes[16 : 16 + size])
            self.paths: list[str] = header["paths"]
            self._first: list[int] = header["first"]
            self.num_sequences: int = header["num_sequences"]
            self.has_tokens: bool = header["has_tokens"]
            at = 16 + size
            self.lines = np.frombuffer(self._bytes, np.uint32, self.num_sequences, at)  # [num_sequences], from 1
            if self.has_tokens:
                at += 4 * self.num_sequences
                self._pointers = np.frombuffer(self._bytes, np.int64, self.num_sequences + 1, at)
                self._steps_at = at + 8 * (self.num_sequences + 1)
                if self._steps_at + int(self._pointers[-1]) != len(self._bytes):
                    raise ValueError("it is cut short")
        except (ValueError, KeyError, struct.error) as error:
            raise DataError(f"{path}: not a file of origins ({error}); write the corpus again, or remove this file") from None

    @classmethod
    def open(cls, prefix: str | os.PathLike[str]) -> Origins | None:
        """The origins of corpus `prefix`, None where none were kept. Raises DataError when they belong to another corpus."""
        path = os.fspath(prefix) + SUFFIX
        if not os.path.exists(path):
            return None
        origins = cls(path)
        index = Path(os.fspath(prefix) + ".idx")
        if index.exists():
            with open(index, "rb") as file:
                num_sequences = int.from_bytes(file.read(26)[18:26], "little")
            if num_sequences != origins.num_sequences:
                raise DataError(
                    f"{path} tells of {origins.num_sequences} sequences and {index} holds {num_sequences}: "
                    "they belong to different corpora; write the corpus again, or remove the former"
                )
        return origins

    def __len__(self) -> int:
        return self.num_sequences

    def document(self, sequence: int) -> tuple[str, int]:
        """(file, line) of a sequence. Raises IndexError outside the corpus."""
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences}")
        return self.paths[bisect_right(self._first, sequence) - 1], int(self.lines[sequence])

    def token(self, sequence: int, offset: int) -> tuple[str, int, int]:
        """(file, line, character of the document's text) where token `offset` of a sequence begins.

        An end-of-document token begins behind the text. Raises IndexError outside the sequence, DataError without kept positions.
        """
        path, line = self.document(sequence)
        starts = self.starts(sequence)
        if not 0 <= offset < len(starts):
            raise IndexError(f"token {offset} of sequence {sequence}, which has {len(starts)}")
        return path, line, int(starts[offset])

    def starts(self, sequence: int) -> np.ndarray:
        """int64 [tokens of the sequence]: the character at which each begins."""
        if not self.has_tokens:
            raise DataError(f"{self.path} keeps files and lines, no positions of tokens; preprocess with --keep-offsets")
        return np.cumsum(unpack_steps(self.packed(sequence)))

    def packed(self, sequence: int) -> bytes:
        """The packed steps of a sequence, as pack_starts gives them; for copying."""
        begin, end = (self._steps_at + int(self._pointers[sequence + k]) for k in (0, 1))
        return self._bytes[begin:end]


class OriginsWriter:
    """Writes PREFIX.origins, which appears, complete, at finalize(); abort() removes what was begun."""

    def __init__(self, prefix: str | os.PathLike[str], with_tokens: bool = False) -> None:
        self.path = os.fspath(prefix) + SUFFIX
        self.with_tokens = with_tokens
        self.num_sequences = self._num_step_bytes = 0
        self._paths: list[str] = []
        self._first: list[int] = []
        self._temporary = {part: f"{self.path}.{part}.tmp{os.getpid()}" for part in ("lines", "pointers", "steps", "whole")}
        self._files = {part: open(self._temporary[part], "wb") for part in (("lines", "pointers", "steps") if with_tokens else ("lines",))}
        if with_tokens:
            self._files["pointers"].write(bytes(8))

    def add(self, path: str, lines: Sequence[int] | np.ndarray, steps: bytes = b"", sizes: Sequence[int] | np.ndarray = ()) -> None:
        """Appends sequences of one file: their lines, and, with_tokens, their packed steps and how many bytes of those each has."""
        lines = np.asarray(lines, dtype=np.int64)
        if lines.size == 0:
            return
        if lines.min() < 0 or lines.max() >= 2**32:
            raise DataError(f"{path}: line {lines.max()}, a file of origins counts to {2**32 - 1}; split the file")
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
            self._first.append(self.num_sequences)
        self._files["lines"].write(lines.astype(np.uint32).tobytes())
        self.num_sequences += lines.size
        if self.with_tokens:
            ends = self._num_step_bytes + np.cumsum(np.asarray(sizes, dtype=np.int64))
            assert ends.size == lines.size and ends[-1] == self._num_step_bytes + len(steps)
            self._files["pointers"].write(ends.tobytes())
            self._files["steps"].write(steps)
            self._num_step_bytes = int(ends[-1])

    def add_from(self, origins: Origins, sequences: Iterable[int]) -> None:
        """Appends sequences of another corpus, for tools that copy them. Raises DataError when it lacks the positions that are kept here."""
        for sequence in sequences:
            path, line = origins.document(sequence)
            if not self.with_tokens:
                self.add(path, [line])
            elif not origins.has_tokens:
                raise DataError(f"{origins.path} keeps no positions of tokens; write these origins without them")
            else:
                steps = origins.packed(sequence)
                self.add(path, [line], steps, [len(steps)])

    def finalize(self) -> None:
        """Joins the parts and gives the file its name."""
        header = json.dumps(
            {"paths": self._paths, "first": self._first, "num_sequences": self.num_sequences, "has_tokens": self.with_tokens, "unit": "character"}
        ).encode()
        with open(self._temporary["whole"], "wb") as whole:
            whole.write(MAGIC + struct.pack("<Q", len(header)) + header)
            for part, file in self._files.items():
                file.close()
                with open(self._temporary[part], "rb") as source:
                    shutil.copyfileobj(source, whole, 16 << 20)
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(self._temporary["whole"], self.path)
        self.abort()

    def abort(self) -> None:
        """Removes the temporary files."""
        for file in self._files.values():
            file.close()
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)


def pack_starts(starts: np.ndarray, lengths: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Packed steps of sequences laid end to end (starts: int64 [tokens]; lengths: their tokens), and the bytes of each sequence."""
    starts, lengths = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    steps = np.diff(starts, prepend=0)
    firsts = (ends - lengths)[lengths > 0]
    steps[firsts] = starts[firsts]
    far = np.flatnonzero((steps < 0) | (steps >= ESCAPE))
    widths = np.ones(starts.size, dtype=np.int64)
    widths[far] = 5
    behind = np.cumsum(widths)
    packed = np.zeros(int(behind[-1]) if starts.size else 0, dtype=np.uint8)
    at = behind - widths
    short = steps.copy()
    short[far] = ESCAPE
    packed[at] = short
    packed[at[far][:, None] + np.arange(1, 5)] = steps[far].astype("<i4").view(np.uint8).reshape(-1, 4)
    total = np.concatenate([[0], behind])
    return packed.tobytes(), total[ends] - total[ends - lengths]


def unpack_steps(packed: bytes) -> np.ndarray:
    """int64 [tokens]: the steps of one sequence."""
    parts, at = [], 0
    while (found := packed.find(b"\xff", at)) >= 0:
        parts += [np.frombuffer(packed, np.uint8, found - at, at), np.frombuffer(packed, "<i4", 1, found + 1)]
        at = found + 5
    return np.concatenate([*parts, np.frombuffer(packed, np.uint8, len(packed) - at, at)]).astype(np.int64)
