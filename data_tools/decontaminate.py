"""Takes evaluation items out of training text: documents that share a run of --ngram words with one, or the spans that do.

  python data_tools/decontaminate.py --input 'work/*.jsonl.zst' --evaluation gsm8k.jsonl mmlu.jsonl --evaluation-keys question \\
      --output work/clean.jsonl.zst --report work/overlap.jsonl

--mode drop leaves such documents out. --mode cut is what GPT-3 did (Brown et al. 2020, arXiv 2005.14165, appendix C): the shared
words go, with --window characters on both sides; the pieces that are left become documents of their own, those shorter than
--min-piece are discarded, and a document that falls into more than --max-pieces goes whole. --max-documents N ignores n-grams
that more than N training documents hold (GPT-3: 10), for which the input is read twice.

In: JSON lines, Parquet or text; evaluation files of the same kinds. Out: one file of records, a line for each evaluation item
with what was found of it, a manifest. Left out: paraphrases and translations; items of fewer than --ngram words, which are named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from data_tools.cli import UsageError, positive, run_tool
from data_tools.options import add_text_options

NUM_NAMED = 5  # documents named for an item, and short items named on stderr


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="decontaminate.py", description="Remove what training text shares with evaluation sets.")
    add_text_options(parser)
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="FILE", help="evaluation sets: files, folders, globs")
    parser.add_argument("--evaluation-keys", nargs="+", default=["text"], metavar="KEY", help="keys whose texts, joined, are an item (default: text)")
    parser.add_argument("--ngram", type=positive, default=13, metavar="N", help="words that must be shared in a row (default: 13; 8 is stricter)")
    parser.add_argument("--mode", choices=("drop", "cut"), default="drop", help="leave out the document, or the span (default: drop)")
    parser.add_argument("--window", type=int, default=200, metavar="CHARS", help="cut so much on both sides of the shared words (default: 200)")
    parser.add_argument("--min-piece", type=int, default=200, metavar="CHARS", help="shortest piece that is kept (default: 200)")
    parser.add_argument("--max-pieces", type=positive, default=10, metavar="N", help="a document in more pieces is left out (default: 10)")
    parser.add_argument("--max-documents", type=positive, metavar="N", help="ignore n-grams of more than N documents (default: none is ignored)")
    parser.add_argument("--report", metavar="FILE", help="write one line of JSON for each evaluation item")
    parser.add_argument("--dry-run", action="store_true", help="count and report, write no documents")
    return parser


@dataclass
class Searched:
    """A block's documents: what is written, which n-grams were found where, and the counts."""

    path: str
    written: list[bytes] = field(default_factory=list)
    hits: list = field(default_factory=list)  # (line number, distinct n-gram numbers)
    problems: list = field(default_factory=list)
    num_untouched: int = 0
    num_cut: int = 0
    num_bytes: int = 0


class Searcher:
    """Searches blocks; one per process."""

    def __init__(self, args: argparse.Namespace, index) -> None:
        self.args, self.index = args, index

    def __call__(self, block) -> Searched:
        import numpy as np

        from data_tools.records import records_of

        records, problems = records_of(block, self.args.json_key)
        result = Searched(block.path, problems=problems, num_bytes=block.num_bytes)
        for record, overlap in zip(records, self.index.find([record.text for record in records])):
            if overlap is None:
                result.written.append(record.raw)
                result.num_untouched += 1
                continue
            result.hits.append((record.line, np.unique(overlap.grams)))
            pieces = self._pieces(record, overlap)
            result.written += pieces
            result.num_cut += bool(pieces)
        return result

    def _pieces(self, record, overlap) -> list[bytes]:
        from data_tools.overlap import cut
        from data_tools.records import with_text

        if self.args.mode == "drop":
            return []
        pieces = cut(record.text, overlap, self.args.window, self.args.min_piece)
        return [with_text(record.raw, self.args.json_key, piece) for piece in pieces] if len(pieces) <= self.args.max_pieces else []


class GramCounter:
    """Counts a block's documents per n-gram; one per process."""

    def __init__(self, args: argparse.Namespace, index) -> None:
        self.searcher = Searcher(argparse.Namespace(**vars(args) | {"mode": "drop"}), index)

    def __call__(self, block):
        """(n-gram numbers, each once for every document that holds it; bytes of input; documents)."""
        import numpy as np

        result = self.searcher(block)
        grams = [grams for _, grams in result.hits]
        return np.concatenate(grams) if grams else np.zeros(0, np.int64), result.num_bytes, result.num_untouched + len(grams)


class Found:
    """What was found of each evaluation item."""

    def __init__(self, index) -> None:
        import numpy as np

        self.index = index
        self.items_of, self.offsets = index.owners()
        self.is_found = np.zeros(index.hashes.size, bool)
        self.num_documents = np.zeros(len(index.items), np.int64)
        self.documents: dict[int, list[str]] = {}

    def add(self, path: str, line: int, grams) -> None:
        """Counts a document that holds these n-grams."""
        self.is_found[grams] = True
        items = {item for gram in grams.tolist() for item in self.items_of[self.offsets[gram] : self.offsets[gram + 1]].tolist()}
        for item in sorted(items):
            self.num_documents[item] += 1
            named = self.documents.setdefault(item, [])
            if len(named) < NUM_NAMED:
                named.append(f"{path}:{line}")

    def lines(self):
        """One dict for each item, in order."""
        index = self.index
        for i, item in enumerate(index.items):
            grams = index.gram_numbers[index.offsets[i] : index.offsets[i + 1]]
            yield {
                "file": item.path, "line": item.line, "words": item.num_words, "ngrams": item.num_ngrams, "found": int(self.is_found[grams].sum()),
                "common": int(index.is_ignored[grams].sum()), "documents": int(self.num_documents[i]), "first_documents": self.documents.get(i, []),
            }  # fmt: skip

    def table(self) -> list[dict]:
        """Counts of items per evaluation file."""
        rows: dict[str, dict] = {}
        for line in self.lines():
            row = rows.setdefault(line["file"], {"file": line["file"], "items": 0, "short": 0, "found": 0, "half": 0})
            row["items"] += 1
            row["short"] += line["ngrams"] == 0
            row["found"] += line["found"] > 0
            row["half"] += 2 * line["found"] >= line["ngrams"] > 0
        return list(rows.values())


def decontaminate(args: argparse.Namespace) -> None:
    from data_tools.manifest import write_manifest
    from data_tools.overlap import read_index
    from data_tools.reader import expand
    from data_tools.records import RecordWriter

    paths = expand(args.input, args.format)
    evaluation = expand(args.evaluation)
    _check(args, [*paths, *evaluation])
    index = read_index(evaluation, args.evaluation_keys, args.ngram)
    _warn_of_short(index)
    if args.max_documents is not None:
        index = _without_common(args, paths, index)
    found = Found(index)
    counts = _search(args, paths, index, found)
    outputs = [] if args.dry_run else [args.output]
    if args.report:
        with RecordWriter(args.report) as writer:
            for line in found.lines():
                writer.write(json.dumps(line, ensure_ascii=False).encode())
        outputs.append(args.report)
    if not args.dry_run:
        write_manifest(args.output, "decontaminate", vars(args), [*paths, *evaluation], outputs, counts | {"evaluation": found.table()})
    for row in found.table():
        print(f"{row['file']}: {row['items']} items, {row['found']} found in part, {row['half']} at least half, {row['short']} too short to search for")
    print(
        f"{counts['documents_in']} documents in: {counts['untouched']} written as they are, {counts['cut']} cut into {counts['pieces']} pieces, "
        f"{counts['dropped']} dropped, {counts['malformed']} malformed"
    )
    print("no documents were written (--dry-run)" if args.dry_run else args.output)


def _check(args: argparse.Namespace, paths: list[str]) -> None:
    from data_tools.records import check_output

    check_output(args.output, paths)
    if args.report:
        check_output(args.report, [*paths, args.output], "--report")
    for name in ("window", "min_piece"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} is below 0")


def _warn_of_short(index) -> None:
    short = [item for item in index.items if item.num_ngrams == 0]
    for item in short[:NUM_NAMED]:
        print(f"{item.path}:{item.line}: an item of {item.num_words} words is shorter than {index.n} and cannot be searched for", file=sys.stderr)
    if len(short) > NUM_NAMED:
        print(f"... and {len(short) - NUM_NAMED} more of {len(index.items)} items; a smaller --ngram finds shorter ones", file=sys.stderr)


def _without_common(args: argparse.Namespace, paths: list[str], index):
    """The index, in which n-grams of more than --max-documents documents are ignored."""
    import numpy as np

    from data_tools.progress import Progress
    from data_tools.reader import read_blocks
    from data_tools.records import total_size
    from data_tools.workers import map_in_order

    num_documents = np.zeros(index.hashes.size, np.int64)
    with Progress("decontaminate: counting", total_size(paths), args.quiet) as progress:
        blocks = read_blocks(paths, args.format, [args.json_key])
        for grams, num_bytes, num_read in map_in_order(GramCounter, (args, index), blocks, args.workers):
            np.add.at(num_documents, grams, 1)
            progress.add(num_bytes, num_read)
    is_common = num_documents > args.max_documents
    print(f"{is_common.sum()} of {is_common.size} n-grams occur in more than {args.max_documents} documents and are ignored")
    return replace(index, is_ignored=is_common)


def _search(args: argparse.Namespace, paths: list[str], index, found: Found) -> dict:
    """Writes what is clean, fills `found`, returns the counts."""
    from data_tools.progress import Progress
    from data_tools.reader import read_blocks
    from data_tools.records import RecordWriter, report_problems, total_size
    from data_tools.workers import map_in_order

    counts = dict.fromkeys(("documents_in", "untouched", "cut", "pieces", "dropped", "malformed"), 0)
    writer = nullcontext() if args.dry_run else RecordWriter(args.output)
    with Progress("decontaminate", total_size(paths), args.quiet) as progress, writer:
        for result in map_in_order(Searcher, (args, index), read_blocks(paths, args.format), args.workers):
            report_problems(result.problems, args.on_error, counts["malformed"])
            for line, grams in result.hits:
                found.add(result.path, line, grams)
            for raw in () if args.dry_run else result.written:
                writer.write(raw)
            num_documents = result.num_untouched + len(result.hits)
            for name, count in (
                ("documents_in", num_documents + len(result.problems)), ("untouched", result.num_untouched), ("cut", result.num_cut),
                ("pieces", len(result.written) - result.num_untouched), ("dropped", len(result.hits) - result.num_cut), ("malformed", len(result.problems)),
            ):  # fmt: skip
                counts[name] += count
            progress.add(result.num_bytes, num_documents)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), decontaminate, argv)


if __name__ == "__main__":
    sys.exit(main())
