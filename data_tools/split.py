"""Divides a corpus into parts of neighbouring documents; each document goes whole, byte for byte, to one part.

  python data_tools/split.py work/web_text_document --output-prefix work/web --split 969,30,1      # work/web_train, _valid, _test
  python data_tools/split.py work/web_text_document --output-prefix work/web --parts 8             # work/web_0 to work/web_7
  python data_tools/split.py work/web_text_document --output-prefix work/web --tokens 1000000000   # of at most so many tokens

--split takes the documents that training with the same data.split takes (of corpora with one sequence per document). --parts makes
parts of nearly equal numbers of tokens; --documents and --tokens say how much a part holds at most (one longer document is a part).

In: the prefix of a corpus. Out: corpora, each complete when it appears, with .origins where the input has them, and a manifest each.
Left out: random division; shuffle the lines of the input for that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data_tools.cli import UsageError, positive, run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split.py", description="Divide a corpus into parts at document boundaries.")
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus (path without .bin/.idx)")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_train ... or P_0 ...")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--split", metavar="A,B,C", help="shares of train, valid and test, for example 969,30,1")
    how.add_argument("--parts", type=positive, metavar="N", help="N parts of nearly equal numbers of tokens")
    how.add_argument("--documents", type=positive, metavar="N", help="parts of N documents")
    how.add_argument("--tokens", type=positive, metavar="N", help="parts of at most N tokens")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def split(args: argparse.Namespace) -> None:
    from data_tools.corpora import corpus_files, write_corpus
    from data_tools.manifest import write_manifest
    from data_tools.progress import Progress
    from engine.data.indexed import IndexedCorpus

    corpus = IndexedCorpus(args.prefix)
    parts = {f"{args.output_prefix}_{name}": documents for name, documents in _parts(args, corpus).items()}
    if os.path.realpath(args.prefix) in map(os.path.realpath, parts):
        raise UsageError(f"--output-prefix {args.output_prefix} would replace the input by one of its parts; choose another name")
    inputs = corpus_files(args.prefix)
    with Progress("split", corpus.num_tokens * corpus.dtype.itemsize, args.quiet) as progress:
        for prefix, documents in parts.items():
            num_tokens = write_corpus(prefix, corpus.dtype, [(corpus, documents)], progress)
            counts = {"first_document": documents.start, "documents": len(documents), "tokens": num_tokens}
            write_manifest(prefix, "split", vars(args), inputs, corpus_files(prefix), counts)
            print(f"{prefix}.bin .idx: documents {documents.start} to {documents.stop - 1}, {num_tokens} tokens")


def _parts(args: argparse.Namespace, corpus) -> dict[str, range]:
    """Names of the parts and their documents; together they are all documents."""
    from engine.data.indexed import DataError
    from engine.data.pretraining import SPLIT_NAMES, split_documents

    from data_tools.corpora import num_documents

    total = num_documents(corpus)
    if args.split:
        named = dict(zip(SPLIT_NAMES, split_documents(total, args.split)))
        return {name: documents for name, documents in named.items() if documents}
    if args.documents:
        bounds = [*range(0, total, args.documents), total]
    elif args.tokens:
        bounds = _bounds_by_tokens(corpus, args.tokens)
    else:
        if args.parts > total:
            raise DataError(f"--parts {args.parts}: {corpus.prefix} has only {total} documents; a document is never divided")
        bounds = _even_bounds(corpus, args.parts)
    width = len(str(len(bounds) - 2))
    return {f"{k:0{width}}": range(begin, end) for k, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:]))}


def _bounds_by_tokens(corpus, max_tokens: int) -> list[int]:
    """Each part takes documents as long as they fit."""
    import numpy as np

    from data_tools.corpora import tokens_before

    before = tokens_before(corpus)
    bounds = [0]
    while bounds[-1] < before.size - 1:
        fitting = int(np.searchsorted(before, before[bounds[-1]] + max_tokens, side="right")) - 1
        bounds.append(max(fitting, bounds[-1] + 1))  # a document that is longer than a part is one by itself
    return bounds


def _even_bounds(corpus, num_parts: int) -> list[int]:
    """The boundary nearest to each equal share of the tokens, with at least one document in every part."""
    import numpy as np

    from data_tools.corpora import tokens_before

    before = tokens_before(corpus)
    total = before.size - 1
    bounds = [0]
    for k in range(1, num_parts):
        wanted = before[-1] * k / num_parts
        nearest = int(np.abs(before - wanted).argmin())
        bounds.append(min(max(nearest, bounds[-1] + 1), total - (num_parts - k)))
    return [*bounds, total]


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), split, argv)


if __name__ == "__main__":
    sys.exit(main())
