"""Is a folder the one that was written? hashes.json: size and XXH3-128 of every file in it.

    write(folder)                      # the last thing a writer does
    problems = check(folder)           # one sentence per file that is missing, of another size, or of other bytes

XXH3 finds accidents (a flipped bit, a file cut short), not forgeries. Reading is all it costs.
Left out: files that were added later, which harm nobody.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

NAME = "hashes.json"
ALGORITHM = "xxh3_128"
NUM_THREADS = 2
BLOCK = 8 << 20  # bytes


def write(folder: Path) -> None:
    """Hash every file of a folder (subfolders included) into its hashes.json, complete or not at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(_describe, files)))
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps({"algorithm": ALGORITHM, "files": found}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / NAME)


def check(folder: Path, contents: bool = True) -> list[str]:
    """What differs from hashes.json, a sentence each; empty when nothing does or there is no such file. contents: False looks at sizes alone."""
    if not (folder / NAME).is_file():
        return []
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        algorithm, files = listed["algorithm"], {name: (entry["bytes"], entry["hash"]) for name, entry in listed["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{NAME} is no list of hashes ({type(error).__name__}: {error})"]
    if algorithm != ALGORITHM:
        return [f"{NAME} is of algorithm {algorithm!r}, expected {ALGORITHM}"]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        return [f"{NAME} names {outside[0]!r}, which lies outside the folder"]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(filter(None, pool.map(lambda item: _problem(folder, *item, contents), files.items())))


def _problem(folder: Path, name: str, wanted: tuple[int, str], contents: bool) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != wanted[0]:
        return f"{name} has {path.stat().st_size} bytes, {wanted[0]} were written"
    if contents and (found := _hash(path)) != wanted[1]:
        return f"{name} has other bytes than were written ({ALGORITHM} {found} instead of {wanted[1]})"
    return ""


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
