"""The options that tools from text to text share: what they read, what they write, how many processes, what a bad line does.

In: a parser. Out: the same parser with the options. Imports nothing heavy: --help must come at once.
"""

from __future__ import annotations

import argparse

from data_tools.cli import positive

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def add_text_options(parser: argparse.ArgumentParser, needs_output: bool = True) -> None:
    """--input, --output, --json-key, --format, --on-error, --workers, --quiet."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines (plain, .gz, .zst), Parquet or text files, folders, globs")
    parser.add_argument("--output", required=needs_output, metavar="FILE", help=f"the documents that are kept, whole records: {', '.join(OUTPUT_SUFFIXES)}")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="the key or column that holds the text (default: text)")
    parser.add_argument("--format", choices=("auto", "jsonl", "text", "parquet"), default="auto", help="input format (default: by the file's suffix)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at a malformed document (default: stop)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes; the result is the same for any number (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number
