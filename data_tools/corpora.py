"""What merge and split share: copying documents from corpus to corpus, with their origins, and which files a corpus has.

In: an opened corpus and a range of its documents. Out: the same documents, tokens byte for byte and cut into the same sequences, in
a writer; PREFIX.origins of the new corpus where every source has one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data_tools.origins import SUFFIX, Origins, OriginsWriter
from data_tools.progress import Progress
from engine.data.indexed import IndexedCorpus, IndexedWriter

Part = tuple[IndexedCorpus, range]  # documents of a corpus


def corpus_files(prefix: str) -> list[str]:
    """The files of a corpus that exist."""
    return [prefix + suffix for suffix in (".bin", ".idx", SUFFIX) if os.path.exists(prefix + suffix)]


def write_corpus(prefix: str, dtype: np.dtype, parts: Sequence[Part], progress: Progress) -> int:
    """Writes a corpus of the documents of all parts in order, and its origins; returns the number of its tokens."""
    num_before = progress.num_tokens
    with IndexedWriter(prefix, dtype) as writer:
        for corpus, documents in parts:
            if len(documents) == num_documents(corpus):
                writer.add_corpus(corpus)
                progress.add(corpus.num_tokens * dtype.itemsize, len(documents), corpus.num_tokens)
            else:
                _copy(writer, corpus, documents, progress)
    _write_origins(prefix, parts)
    return progress.num_tokens - num_before


def num_documents(corpus: IndexedCorpus) -> int:
    return len(corpus.document_indices) - 1


def tokens_before(corpus: IndexedCorpus) -> np.ndarray:
    """int64 [num_documents + 1]: the tokens before each document; the last is all of them."""
    ends = np.zeros(len(corpus) + 1, np.int64)
    np.cumsum(corpus.sequence_lengths, out=ends[1:])
    return ends[np.array(corpus.document_indices)]


def _copy(writer: IndexedWriter, corpus: IndexedCorpus, documents: range, progress: Progress) -> None:
    bounds = np.array(corpus.document_indices[documents.start : documents.stop + 1]).tolist()
    for first, end in zip(bounds[:-1], bounds[1:]):
        pieces = [corpus.get(sequence) for sequence in range(first, end)]
        lengths = [piece.size for piece in pieces]
        writer.add_document(np.concatenate(pieces) if pieces else np.zeros(0, corpus.dtype), lengths)
        num_tokens = sum(lengths)
        progress.add(num_tokens * corpus.dtype.itemsize, 1, num_tokens)


def _write_origins(prefix: str, parts: Sequence[Part]) -> None:
    """Nothing where a source has none; one that is left from an earlier corpus of this name is removed then."""
    sources = [Origins.open(corpus.prefix) for corpus, _ in parts]
    if any(origins is None for origins in sources):
        if os.path.exists(prefix + SUFFIX):
            os.unlink(prefix + SUFFIX)
        return
    writer = OriginsWriter(prefix, with_tokens=all(origins.has_tokens for origins in sources))
    try:
        for (corpus, documents), origins in zip(parts, sources):
            first, end = (int(corpus.document_indices[d]) for d in (documents.start, documents.stop))
            writer.add_from(origins, range(first, end))
        writer.finalize()
    except BaseException:
        writer.abort()
        raise
