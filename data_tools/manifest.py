"""Where a file comes from: OUTPUT.manifest.json beside each output of a tool.

In: what a tool was given, read, wrote and counted. Out: a JSON file with the tool, its version and git revision, its arguments,
size and SHA-256 of every input and output, the counts, the date and the versions of the libraries in use. An input that has a
manifest of its own is named with that manifest's hash, so that manifests form a chain back to the raw files;
data_tools/provenance.py prints and checks it. Paths are relative to the manifest's folder: a tree that moves stays whole.
Hashing reads every file once more. Left out: signatures; contents that change while a tool reads them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from engine.data.indexed import DataError

FORMAT = 1
SUFFIX = ".manifest.json"
LIBRARIES = ("numpy", "tokenizers", "sentencepiece", "tiktoken", "gigatoken", "orjson", "zstandard", "pyarrow", "rensa", "py3langid")


def write_manifest(
    output: str | os.PathLike[str],
    tool: str,
    arguments: Mapping[str, object],
    inputs: Sequence[str | os.PathLike[str]],
    outputs: Sequence[str | os.PathLike[str]],
    counts: Mapping[str, object],
) -> Path:
    """Writes OUTPUT.manifest.json, complete or not at all, and returns its path.

    output is a file, or the prefix of a corpus. inputs and outputs are files that exist; a folder stands for the files in it.
    """
    path = Path(os.fspath(output) + SUFFIX)
    content = {
        "format": FORMAT,
        "tool": tool,
        "version": _version(),
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": dict(arguments),
        "counts": dict(counts),
        "inputs": [_describe(file, path.parent, with_manifest=True) for file in _files(inputs)],
        "outputs": [_describe(file, path.parent) for file in _files(outputs)],
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES if name in sys.modules},
    }
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_manifest(path: str | os.PathLike[str]) -> dict:
    """The manifest in a file. Raises DataError when it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot open ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error})") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise DataError(f"{path}: manifest format {version!r}, expected {FORMAT}; read it with the release that wrote it")
    return content


def manifest_of(path: str | os.PathLike[str]) -> Path | None:
    """The manifest of a file or of a corpus (its prefix, .bin or .idx), if there is one."""
    text = os.fspath(path)
    stems = [text, text.removesuffix(".bin"), text.removesuffix(".idx")]
    return next((Path(stem + SUFFIX) for stem in stems if os.path.isfile(stem + SUFFIX)), None)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal. A file that has not changed is read once per process."""
    stat = os.stat(path)
    return _sha256(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterable[Path]:
    for path in map(Path, paths):
        yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _describe(path: Path, folder: Path, with_manifest: bool = False) -> dict:
    entry = {"path": os.path.relpath(path, folder), "bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = manifest_of(path) if with_manifest else None
    if manifest is not None:
        entry["manifest"] = {"path": os.path.relpath(manifest, folder), "sha256": sha256(manifest)}
    return entry


def _version() -> str:
    try:
        return importlib.metadata.version("trireme-lm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str | None:
    """The commit of this source tree, with -dirty when it was changed; None outside a git tree."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or a tree that git does not trust: the manifest is worth having without
