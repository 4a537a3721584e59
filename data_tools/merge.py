"""Joins corpora into one: their documents in the order given. The bytes are copied, not decoded.

  python data_tools/merge.py --input work/a_text_document work/b_text_document --output-prefix work/all_text_document

In: prefixes of corpora of one token type. Out: OUTPUT.bin and .idx, which appear when complete, .origins when all inputs have one,
and a manifest. Left out: shuffling (the sample order does that) and translating between token types or tokenizers.
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
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def merge(args: argparse.Namespace) -> None:
    from data_tools.corpora import corpus_files, num_documents, write_corpus
    from data_tools.manifest import write_manifest
    from data_tools.progress import Progress
    from engine.data.indexed import DataError, IndexedCorpus

    if os.path.realpath(args.output_prefix) in map(os.path.realpath, args.input):
        raise UsageError(f"--output-prefix {args.output_prefix} is also an input; choose another name")
    corpora = [IndexedCorpus(prefix) for prefix in args.input]  # all are checked before anything is written
    for corpus in corpora[1:]:
        if corpus.dtype != corpora[0].dtype:
            raise DataError(
                f"{corpus.prefix}: tokens are {corpus.dtype.name}, those of {corpora[0].prefix} {corpora[0].dtype.name}; merge corpora of one token type"
            )
    total_bytes = sum(corpus.num_tokens * corpus.dtype.itemsize for corpus in corpora)
    parts = [(corpus, range(num_documents(corpus))) for corpus in corpora]
    with Progress("merge", total_bytes, args.quiet) as progress:
        num_tokens = write_corpus(args.output_prefix, corpora[0].dtype, parts, progress)
    counts = {"corpora": len(corpora), "documents": progress.num_documents, "tokens": num_tokens}
    inputs = [path for prefix in args.input for path in corpus_files(prefix)]
    write_manifest(args.output_prefix, "merge", vars(args), inputs, corpus_files(args.output_prefix), counts)
    print(f"{len(corpora)} corpora, {progress.num_documents} documents, {num_tokens} tokens -> {args.output_prefix}.bin .idx")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())
