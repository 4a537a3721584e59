"""A small corpus that every machine with Python already has: the standard library's own source.

    python examples/quickstart/corpus.py --output-dir examples/quickstart/work/corpus

One document = one .py file under sysconfig.get_paths()["stdlib"], written as a JSON line {"text", "path"} to train.jsonl or
valid.jsonl. The side is decided by a hash of the relative path, so it does not depend on the order, the machine or a seed.
Left out: site-packages; tests (most of the bytes, and repetitive); `encodings` and `pydoc_data`, generated tables whose
near-copies would sit on both sides and flatter the validation loss; files whose text was already seen; files that are not text.
"""

import argparse
import hashlib
import json
import os
import platform
import sysconfig
import tokenize
from pathlib import Path

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idle_test", "__phello__"}
HELD_OUT_PERCENT = 5


def documents(stdlib: Path):
    """Yield (relative path, text) of every chosen file, in the order of the paths."""
    seen_texts = set()
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's coding cookie
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip() or digest in seen_texts:
            continue
        seen_texts.add(digest)
        yield relative.as_posix(), text


def is_held_out(path: str) -> bool:
    """True for HELD_OUT_PERCENT of all paths; the same paths everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def write_jsonl(file: Path, rows: list[tuple[str, str]]) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for path, text in rows:
            out.write(json.dumps({"text": text, "path": path}) + "\n")
    os.replace(partial, file)  # an interrupted run leaves no half corpus behind
    num_bytes = sum(len(text.encode()) for _, text in rows)
    print(f"{file.name:<12} {len(rows):>5} documents {num_bytes / 1e6:>7.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder that gets train.jsonl and valid.jsonl")
    output = parser.parse_args().output_dir

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    rows = list(documents(stdlib))
    output.mkdir(parents=True, exist_ok=True)
    print(f"standard library of Python {platform.python_version()}, {HELD_OUT_PERCENT}% of the files held out by a hash of their path")
    write_jsonl(output / "valid.jsonl", [row for row in rows if is_held_out(row[0])])
    write_jsonl(output / "train.jsonl", [row for row in rows if not is_held_out(row[0])])


if __name__ == "__main__":
    main()
