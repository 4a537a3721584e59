"""Opens a corpus where it lies: on local or mounted disks, or in an object store, with one line for each of them.

    corpus = open_corpus("data/web")                                   # mapped
    corpus = open_corpus("/mnt/cold/web", storage="pread")             # read by many reads at once
    corpus = open_corpus("s3://bucket/web", cache_dir="/scratch")      # engine/data/remote.py keeps a local copy of what was read

Everything after opening is the same: engine/data/indexed.py. When to choose what: docs/storage.md.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.data.indexed import IndexedCorpus

__all__ = ["is_remote", "open_corpus"]


def is_remote(prefix: str | os.PathLike[str]) -> bool:
    """Whether a prefix names an object store or a server, such as s3://bucket/web; file:// is local."""
    return "://" in os.fspath(prefix) and not os.fspath(prefix).startswith("file://")


def open_corpus(prefix: str | os.PathLike[str], storage: str = "mmap", cache_dir: str | os.PathLike[str] | None = None) -> IndexedCorpus:
    """The corpus of a prefix. cache_dir: where parts of remote corpora are kept; None takes a folder of the user's.

    Raises DataError for missing, damaged or unreachable files.
    """
    prefix = os.fspath(prefix)
    if not is_remote(prefix):
        return IndexedCorpus(prefix.removeprefix("file://"), storage)
    from engine.data.remote import open_remote  # fsspec and its parts are optional

    return open_remote(prefix, storage, Path(cache_dir) if cache_dir else _user_cache())


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trireme"
