"""Joins corpora into one: their documents in the order given. The bytes are copied, not decoded.

  python data_tools/merge.py --input work/a_text_document work/b_text_document --output-prefix work/all_text_document

In: prefixes of corpora of one token type. Out: OUTPUT.bin and .idx, which appear when complete.
Left out: shuffling (the sample order does that) and translating between token types or tokenizers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data_tools.cli import UsageError, run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="merge.py", description="Join several corpora into one.")
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="corpora to join, in this order (paths without .bin/.idx)")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    return parser


def merge(args: argparse.Namespace) -> None:
    from engine.data.indexed import IndexedCorpus, IndexedWriter

    if os.path.realpath(args.output_prefix) in map(os.path.realpath, args.input):
        raise UsageError(f"--output-prefix {args.output_prefix} is also an input; choose another name")
    corpora = [IndexedCorpus(prefix) for prefix in args.input]  # all are checked before anything is written
    with IndexedWriter(args.output_prefix, corpora[0].dtype) as writer:
        for corpus in corpora:
            writer.add_corpus(corpus)
    total = sum(corpus.num_tokens for corpus in corpora)
    print(f"{len(corpora)} corpora, {writer.num_documents} documents, {total} tokens -> {args.output_prefix}.bin .idx")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())
