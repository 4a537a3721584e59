"""Is a folder the one that was written? hashes.json: size and XXH3-128 of every file in it.

    write(folder)                      # the last thing a writer does
    problems = check(folder)           # one sentence per file that is missing, of another size, or of other bytes

    with HashedFile(path) as file:     # the same without reading again: hashed while written, on the disk when it is closed
        file.write(data)
    write_list(folder, {name: file.entry})

XXH3 finds accidents (a flipped bit, a file cut short), not forgeries. Reading is all it costs. The list holds a hash of itself.
Left out: files that were added later, which harm nobody.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

NAME = "hashes.json"
ALGORITHM = "xxh3_128"
NUM_THREADS = 2
BLOCK = 8 << 20  # bytes
SMALL = 64 << 10  # bytes: shorter pieces are written together


def write(folder: Path) -> None:
    """Hash every file of a folder (subfolders included) into its hashes.json, complete or not at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(_describe, files)))
    write_list(folder, found)


def write_list(folder: Path, files: Mapping[str, dict]) -> None:
    """hashes.json of files whose entries, {"bytes": ..., "hash": ...}, are known. On the disk when this returns."""
    temporary = folder / f"{NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps({"algorithm": ALGORITHM, "list": _hash_of_list(files), "files": dict(files)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)


def check(folder: Path, contents: bool = True, only: Callable[[int, str], bool] = lambda number, name: True) -> list[str]:
    """What differs from hashes.json, a sentence each; empty when nothing does or there is no such file.

    contents: False looks at sizes alone. only: which entries to look at, by their number in the list and their name."""
    if not (folder / NAME).is_file():
        return []
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        algorithm, files = listed["algorithm"], {name: (entry["bytes"], entry["hash"]) for name, entry in listed["files"].items()}
        own = {"list": _hash_of_list(listed["files"])} if "list" in listed else {}  # lists of earlier exports have none
        is_whole = listed == {"algorithm": algorithm, "files": listed["files"], **own}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{NAME} is no list of hashes ({type(error).__name__}: {error})"]
    if algorithm != ALGORITHM:
        return [f"{NAME} is of algorithm {algorithm!r}, expected {ALGORITHM}"]
    if not is_whole:
        return [f"{NAME} is another list than was written"]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        return [f"{NAME} names {outside[0]!r}, which lies outside the folder"]
    chosen = [item for number, item in enumerate(sorted(files.items())) if only(number, item[0])]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(filter(None, pool.map(lambda item: _problem(folder, *item, contents), chosen)))


def _problem(folder: Path, name: str, wanted: tuple[int, str], contents: bool) -> str:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted[0]:
            return f"{name} has {path.stat().st_size} bytes, {wanted[0]} were written"
        if contents and (found := _hash(path)) != wanted[1]:
            return f"{name} has other bytes than were written ({ALGORITHM} {found} instead of {wanted[1]})"
    except OSError as error:  # a disk that cannot read it any more, say
        return f"{name} cannot be read ({error})"
    return ""


class HashedFile:
    """A new file whose bytes are hashed as they are written, and which is on the disk when it is closed. As a context manager."""

    def __init__(self, path: Path):
        self._file, self._digest, self._small, self._bytes = open(path, "wb", buffering=0), xxhash.xxh3_128(), bytearray(), 0

    def write(self, data) -> int:
        """data: anything with bytes. Small pieces are gathered, for archives consist of many."""
        data = memoryview(data).cast("B")
        self._bytes += len(data)
        self._small += data[:SMALL] if len(data) <= SMALL else b""
        if len(self._small) > SMALL or len(data) > SMALL:
            self.flush()
        if len(data) > SMALL:
            self._put(data)
        return len(data)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        gathered, self._small = self._small, bytearray()
        self._put(memoryview(gathered))

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), BLOCK):
            block = data[start:start + BLOCK]
            self._digest.update(block)
            while block:
                block = block[self._file.write(block):]  # less than asked is written when a disk is nearly full

    @property
    def entry(self) -> dict:
        """Size and hash of what was written and flushed."""
        return {"bytes": self._bytes, "hash": self._digest.hexdigest()}

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _hash_of_list(files: Mapping[str, dict]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "hash": _hash(path)}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterable[memoryview]:
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]
