"""Prints where a file comes from, back to the raw files, and checks that no file of the chain has changed.

  python data_tools/provenance.py work/web_text_document

In: a file or corpus with a manifest (data_tools/manifest.py). Out: a tree of tools and files on stdout; exit code 1 when a file
differs from its manifest or an output is gone. Inputs that were deleted since are named, and are no error.
--quick compares sizes only. Left out: repeating the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.cli import run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="provenance.py", description="Print and check how a file was made.")
    parser.add_argument("path", metavar="P", help="a file, the prefix of a corpus, or a manifest")
    parser.add_argument("--quick", action="store_true", help="compare sizes, do not read the files to compare hashes")
    return parser


def provenance(args: argparse.Namespace) -> None:
    from data_tools.manifest import SUFFIX, manifest_of
    from engine.data.indexed import DataError

    manifest = Path(args.path) if args.path.endswith(SUFFIX) else manifest_of(args.path)
    if manifest is None:
        raise DataError(f"{args.path}: there is no {args.path}{SUFFIX}; tools write one beside each output")
    wrong = _print_chain(manifest, 0, args.quick, set())
    if wrong:
        raise DataError("; ".join(wrong))


def _print_chain(manifest: Path, depth: int, quick: bool, seen: set[str]) -> list[str]:
    """Prints one manifest and those of its inputs; returns what is wrong."""
    from data_tools.manifest import read_manifest

    indent = "    " * depth
    content = read_manifest(manifest)
    print(f"{indent}{content['tool']} {content['version']} ({content['revision'] or 'no revision'}), {content['date']}")
    print(f"{indent}  arguments: {' '.join(f'{key}={value}' for key, value in content['arguments'].items() if value is not None)}")
    print(f"{indent}  counts: {' '.join(f'{key}={value}' for key, value in content['counts'].items())}")
    wrong = []
    for role in ("outputs", "inputs"):
        for entry in content[role]:
            state, fault = _check(manifest, entry, role, quick)
            print(f"{indent}  {role[:-1]} {entry['path']}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:16]}, {state}")
            wrong += [fault] if fault else []
            wrong += _follow(manifest, entry, depth, quick, seen)
    return wrong


def _follow(manifest: Path, entry: dict, depth: int, quick: bool, seen: set[str]) -> list[str]:
    if "manifest" not in entry:
        return []
    path = Path(os.path.normpath(manifest.parent / entry["manifest"]["path"]))
    if not path.exists():
        print("    " * (depth + 1) + f"{path} is gone; the chain ends here")
        return []
    from data_tools.manifest import sha256

    if str(path) in seen:  # both files of a corpus lead to one manifest
        return []
    seen.add(str(path))
    differs = sha256(path) != entry["manifest"]["sha256"]
    fault = [f"{path} differs from what {manifest} recorded: the input was made again since"] if differs else []
    return fault + _print_chain(path, depth + 1, quick, seen)


def _check(manifest: Path, entry: dict, role: str, quick: bool) -> tuple[str, str | None]:
    """(a word for the listing, what is wrong or None)."""
    from data_tools.manifest import sha256

    path = Path(os.path.normpath(manifest.parent / entry["path"]))
    if not path.exists():
        return "gone", f"{path} is gone, and {manifest} lists it as an output" if role == "outputs" else None
    size = path.stat().st_size
    if size != entry["bytes"]:
        return "DIFFERS", f"{path} has {size} bytes, {manifest} recorded {entry['bytes']}"
    if quick:
        return "same size", None
    if sha256(path) != entry["sha256"]:
        return "DIFFERS", f"{path}: its SHA-256 differs from the one that {manifest} recorded"
    return "ok", None


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), provenance, argv)


if __name__ == "__main__":
    sys.exit(main())
