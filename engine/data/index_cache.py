"""Arrays that are built once and then mapped: a folder of .npy files, named by what they depend on.

    arrays = cached_arrays(folder, {"class": "GPTSamples", "split": "train", "lengths": digest(lengths), ...}, names, build, fits)

Left out: removing entries that nobody asks for any more.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from engine._csrc import map_file
from engine.data.indexed import DataError

PIECE = 2**22  # numbers hashed at a time
HEADER_BYTES = 1024  # more than the header of an array of numbers takes


def digest(values: np.ndarray) -> str:
    """By pieces and in threads (hashlib lets go of the GIL), so that a billion lengths take neither a copy of all nor many seconds."""
    pieces = [values[i:i + PIECE] for i in range(0, len(values), PIECE)]
    hash_of = lambda piece: hashlib.blake2b(np.ascontiguousarray(piece).data, digest_size=16).digest()  # noqa: E731
    if len(pieces) == 1:
        return hash_of(pieces[0]).hex()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return hashlib.blake2b(b"".join(threads.map(hash_of, pieces)), digest_size=16).hexdigest()


def cached_arrays(
    cache_dir: str,
    description: dict,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
    fits: Callable[[tuple[np.ndarray, ...]], bool],
) -> tuple[np.ndarray, ...]:
    """The arrays of a description: mapped from cache_dir when all are there and fit, otherwise built and stored.

    Safe when several processes build at once: each writes its own temporary file, contents are equal, renames are atomic.
    Raises DataError when the folder cannot be written.
    """
    text = json.dumps(description, indent=1, sort_keys=True)
    key = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    stem = os.path.join(cache_dir, f"{key}-{description['class']}-{description['split']}")
    paths = [f"{stem}-{name}.npy" for name in names]
    arrays = _load_arrays(paths)
    if arrays is not None and fits(arrays):
        return arrays
    arrays = build()
    try:
        os.makedirs(cache_dir, exist_ok=True)
        for path, values in zip(paths, arrays):
            _replace_file(path, lambda file, values=values: np.save(file, values))
        _replace_file(f"{stem}-description.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise DataError(f"cannot write the index cache in {cache_dir}: {error.strerror}; choose a writable cache_dir, or none") from None
    # Map what was stored: ranks of one machine then share the pages instead of each holding a copy.
    return _load_arrays(paths) or arrays


def _load_arrays(paths: list[str]) -> tuple[np.ndarray, ...] | None:
    try:
        return tuple(map(_mapped, paths))
    except (OSError, ValueError, EOFError):  # missing or damaged: both mean build again
        return None


def _mapped(path: str) -> np.ndarray:
    """np.load(path, mmap_mode="r"), which would hold a descriptor for each array: ten thousand sources have thirty thousand."""
    content = map_file(path)
    head = io.BytesIO(content[:HEADER_BYTES].tobytes())
    version, (shape, is_fortran, dtype) = np.lib.format.read_magic(head), np.lib.format.read_array_header_1_0(head)
    if version != (1, 0) or is_fortran:
        raise ValueError(f"{path}: not an array that was written here")
    return np.frombuffer(content, dtype, math.prod(shape), head.tell()).reshape(shape)


def _replace_file(path: str, write: Callable) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=os.path.basename(path), suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, and the cache is shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
