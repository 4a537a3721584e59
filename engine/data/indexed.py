"""Tokenised corpora on disk: the Python face of csrc's reader, and the writer.

A corpus is two files: PREFIX.idx (header, sequence lengths, byte offsets, documents) and PREFIX.bin (raw tokens), byte for
byte Megatron's format. Tokens enter through IndexedWriter.add_document and leave as read-only arrays, or many samples at once as one
block; which samples is engine/data/pretraining.py's part, and corpora that lie elsewhere are opened by engine/data/storage.py.

A document is a run of sequences; corpora written here have one sequence per document.
Left out: multimodal corpora, floating-point tokens.
"""

from __future__ import annotations

import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine._csrc import Corpus, DataError, announce, extents, gather

__all__ = ["DataError", "IndexedCorpus", "IndexedWriter", "optimal_dtype"]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
MAX_SEQUENCE_LENGTH = 2**31 - 1  # lengths are int32 on disk


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The token type Megatron writes: uint16 below 65500 ids, otherwise int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedCorpus:
    """A corpus opened for reading, at the same small cost for ten documents and for 1e9.

    storage: how the .bin is read. "mmap" as memory, best while it stays in the page cache; "pread" by many reads at once, best when
    it does not. blocks: a RemoteBlocks of engine/data/remote.py that fills the local .bin before it is read.
    Raises DataError when a file is missing, damaged or truncated: here, or where the damaged place is used.
    """

    def __init__(self, prefix: str | os.PathLike[str], storage: str = "mmap", blocks=None) -> None:
        self.prefix = os.fspath(prefix)
        self._file = Corpus(self.prefix, storage)
        self._blocks = blocks
        self.listens = blocks is not None or storage == "pread"  # whether announce() has an effect
        self._max_token: int | None = None

    @property
    def mapped(self) -> Corpus:
        """The csrc object, for engine._csrc.gather. Not of a remote corpus: its blocks must be fetched first, which gather() here does."""
        assert self._blocks is None, f"{self.prefix} is remote: gather through IndexedCorpus.gather"
        return self._file

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [num_sequences], a read-only and possibly unaligned view of the .idx file. The first use checks every length and offset."""
        return self._file.sequence_lengths

    @property
    def document_indices(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d is sequences [d] up to [d + 1]; a view as sequence_lengths, checked as a whole likewise."""
        return self._file.document_indices

    @property
    def num_documents(self) -> int:
        """Documents; each a run of sequences."""
        return self._file.num_documents

    def document(self, d: int) -> tuple[int, int]:
        """(first sequence, sequence after the last) of document d, without reading the others."""
        return self._file.document(int(d))

    def verify(self) -> None:
        """Reads the whole .idx and checks every length, offset and document entry. Raises DataError."""
        self._file.sequence_lengths, self._file.document_indices  # noqa: B018

    @property
    def dtype(self) -> np.dtype:
        """Type of one token in the .bin file."""
        return self._file.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens in the whole corpus."""
        return self._file.num_tokens

    def __len__(self) -> int:
        """Number of sequences."""
        return self._file.num_sequences

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of sequence i, read-only (a view where mapped); to its end when length is None.

        Raises IndexError outside the corpus or the sequence (negative numbers included).
        """
        i, offset, length = int(i), int(offset), None if length is None else int(length)
        if self._blocks is not None:
            self._blocks.ensure(self._file.extent(i, offset, length))
        return self._file.get(i, offset, length)

    def gather(self, documents: np.ndarray, starts: np.ndarray, rows: np.ndarray, seq_len: int, **options) -> tuple[np.ndarray, np.ndarray | None]:
        """Samples of seq_len + 1 tokens by rows of a sample index; arguments, options and answer as engine._csrc.gather."""
        if self._blocks is not None:
            self._blocks.ensure(extents(self._file, documents, starts, rows, seq_len))
        return gather(self._file, documents, starts, rows, seq_len, **options)

    def announce(self, documents: np.ndarray, starts: np.ndarray, rows: np.ndarray, seq_len: int) -> None:
        """Says which rows will be gathered next, so that they are fetched meanwhile."""
        if self._blocks is not None:
            self._blocks.want(extents(self._file, documents, starts, rows, seq_len))
        else:
            announce(self._file, documents, starts, rows, seq_len)

    def max_token(self) -> int:
        """The greatest token id, -1 without tokens. Reads the whole .bin the first time, then remembers."""
        if self._max_token is None:
            if self._blocks is not None:
                self._blocks.ensure(np.array([[0, self.num_tokens * self.dtype.itemsize]]))
            self._max_token = self._file.max_token()
        return self._max_token


class IndexedWriter:
    """Writes a corpus. PREFIX.bin and PREFIX.idx appear, complete, when finalize() is called, and not before.

    Use as a context manager, or call abort() on failure: either removes the temporary files.
    An existing corpus of the same name is replaced. Raises DataError for ids that do not fit the dtype.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in DTYPE_CODES:
            raise DataError(f"token dtype is {self.dtype.name}, expected one of {', '.join(DTYPE_CODES)}; token ids are integers")
        if not os.path.basename(self.prefix):
            raise DataError(f"output prefix {self.prefix!r} names a folder; add a file name, for example {self.prefix}corpus")
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._temporary = {kind: f"{self.prefix}.{kind}.tmp{os.getpid()}" for kind in ("bin", "idx")}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temporary["bin"], "wb", buffering=1 << 20)
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}.bin: {error.strerror}; choose an output prefix in a writable folder") from None

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Appends one document. lengths splits its tokens into several sequences; without it the document is one.

        Raises DataError when an id does not fit the dtype or the document is longer than 2^31 - 1 tokens.
        """
        tokens = np.asarray(tokens)
        lengths = [tokens.size] if lengths is None else [int(n) for n in lengths]
        if tokens.ndim != 1 or sum(lengths) != tokens.size or min(lengths, default=0) < 0:
            raise DataError(f"document {self.num_documents}: lengths sum to {sum(lengths)}, but it has shape {tokens.shape}; give a flat list")
        self._check_ids(tokens)
        if max(lengths, default=0) > MAX_SEQUENCE_LENGTH:
            raise DataError(f"document {self.num_documents}: a sequence of {max(lengths)} tokens, the format holds {MAX_SEQUENCE_LENGTH}; split it")
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def add_corpus(self, corpus: IndexedCorpus) -> None:
        """Appends every document of another corpus of the same dtype by copying its bytes."""
        if corpus.dtype != self.dtype:
            raise DataError(f"{corpus.prefix}: tokens are {corpus.dtype.name}, expected {self.dtype.name}; merge corpora of one token type")
        num_before = len(self._lengths)
        with open(corpus.prefix + ".bin", "rb") as source:
            shutil.copyfileobj(source, self._bin, 16 << 20)
        self._lengths.frombytes(corpus.sequence_lengths.tobytes())
        self._documents.frombytes((corpus.document_indices[1:] + num_before).tobytes())

    def finalize(self) -> None:
        """Writes the index and gives both files their names. Raises DataError when no sequence was added."""
        if not self._lengths:
            self.abort()
            raise DataError(f"{self.prefix}: no documents were added, so there is nothing to write; check the input")
        try:
            self._write_index()
            _close_on_disk(self._bin)
            # The .idx goes first and comes last: at no moment do two files of different corpora stand side by side.
            Path(self.prefix + ".idx").unlink(missing_ok=True)
            os.replace(self._temporary["bin"], self.prefix + ".bin")
            os.replace(self._temporary["idx"], self.prefix + ".idx")
        except OSError:
            self.abort()
            raise

    def abort(self) -> None:
        """Removes the temporary files; nothing appears under the final name."""
        try:
            self._bin.close()
        except OSError:
            pass  # a full disk fails again in close(); the file goes anyway
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.finalize()
        else:
            self.abort()

    def _check_ids(self, tokens: np.ndarray) -> None:
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise DataError(f"document {self.num_documents}: tokens are {tokens.dtype.name}, expected integers")
        if tokens.dtype == self.dtype:
            return
        for token in (int(tokens.min()), int(tokens.max())):
            if not self._limits.min <= token <= self._limits.max:
                raise DataError(
                    f"document {self.num_documents}: token id {token} does not fit {self.dtype.name} "
                    f"({self._limits.min} to {self._limits.max}); choose the dtype with optimal_dtype(vocab_size)"
                )

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        index = open(self._temporary["idx"], "wb")
        index.write(MAGIC + struct.pack("<QBQQ", VERSION, DTYPE_CODES[self.dtype.name], lengths.size, len(self._documents)))
        for values in (lengths, pointers, np.frombuffer(self._documents, dtype=np.int64)):
            index.write(values.tobytes())
        _close_on_disk(index)


def _close_on_disk(file) -> None:
    # Renaming before the bytes are on disk can leave a complete name on an empty file after a power cut.
    file.flush()
    os.fsync(file.fileno())
    file.close()
