"""Leaves out documents that are, or nearly are, copies of an earlier one, across all input files.

  python data_tools/dedup.py --input 'crawl/*.jsonl.zst' books.jsonl --output work/unique.jsonl.zst --duplicates work/removed.jsonl

--method exact compares hashes of the text in lower case with its white space evened out; --method minhash (the default) finds
documents that share --threshold of their word n-grams. Of each cluster the first in input order is kept, whatever the number of
workers. The input is read twice: once to hash, once to copy what stays, byte for byte.

In: JSON lines, Parquet or text. Out: one file of whole records, a list of what was removed and for which document, a manifest.
Memory: 40 bytes a document (exact), 60 and 16 a pair (minhash), with 4 * num_perm bytes a document on disk beside the output.
Left out: paragraphs inside documents (filter.py counts them), similar meaning in other words.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate

from data_tools.cli import UsageError, positive, run_tool
from data_tools.options import add_text_options, fraction


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dedup.py", description="Keep the first of documents that are copies or near-copies of each other.")
    add_text_options(parser)
    parser.add_argument("--method", choices=("exact", "minhash"), default="minhash", help="equal texts, or similar ones (default: minhash)")
    parser.add_argument("--threshold", type=fraction, default=0.8, metavar="J", help="least Jaccard similarity of near-copies (default: 0.8)")
    parser.add_argument("--ngram", type=positive, default=5, metavar="N", help="words in an n-gram (default: 5)")
    parser.add_argument("--num-perm", type=positive, default=128, metavar="N", help="entries of a signature (default: 128)")
    parser.add_argument("--bands", type=positive, metavar="N", help="bands of a signature (default: so that 90%% of pairs at the threshold are found)")
    parser.add_argument("--seed", type=int, default=42, help="of the hash functions (default: 42)")
    parser.add_argument(
        "--verify", choices=("none", "estimate", "exact"), default="estimate",
        help="test pairs that agree in a band: not at all, by their signatures, or by their n-grams, read once more (default: estimate)",
    )  # fmt: skip
    parser.add_argument("--duplicates", metavar="FILE", help="write one line of JSON for each removed document")
    parser.add_argument("--dry-run", action="store_true", help="count, write nothing")
    return parser


class Hasher:
    """A block's documents as rows of one size; one per process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self, block):
        """(path, line numbers, rows as bytes, bytes of input, problems)."""
        from data_tools.reader import parse_block

        lines, (texts,), problems = parse_block(block, [self.args.json_key])
        return block.path, lines, self.rows(texts) if texts else b"", block.num_bytes, problems

    def rows(self, texts: list[str]) -> bytes:
        if self.args.method == "exact":
            return b"".join(map(exact_digest, texts))
        from data_tools.minhash import signatures

        return signatures(texts, self.args.ngram, self.args.num_perm, self.args.seed).tobytes()


def exact_digest(text: str) -> bytes:
    """16 bytes, equal for texts that differ in case, white space or Unicode form only."""
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


class Places:
    """Where the documents stand: document d is a line of a file. Numbers follow the order of the input."""

    def __init__(self, paths: list[str]) -> None:
        self.lines = array("q")
        self.num_documents = dict.fromkeys(paths, 0)
        self._paths: list[str] = []
        self._ends: list[int] = []

    def add(self, path: str, numbers: list[int]) -> None:
        self.lines.extend(numbers)
        self.num_documents[path] += len(numbers)

    def numbered(self, blocks: Iterable, json_key: str) -> Iterator[tuple[object, list[tuple[int, int, bytes]]]]:
        """(block, its documents as (document number, line number, line of JSON)) for the blocks of the same files, read once more."""
        from data_tools.records import raw_lines

        ranges, first = {}, 0
        for path, count in self.num_documents.items():
            ranges[path] = [first, first + count]
            first += count
        for block in blocks:
            rest, found = ranges[block.path], []
            for number, raw in raw_lines(block, json_key):
                if rest[0] < rest[1] and number == self.lines[rest[0]]:  # lines that could not be read are passed over
                    found.append((rest[0], number, raw))
                    rest[0] += 1
            yield block, found
        for path, (begin, end) in ranges.items():
            if begin < end:
                from engine.data.indexed import DataError

                raise DataError(f"{path}: changed while it was read: line {self.lines[begin]} is gone; nothing was written, start again")

    def place(self, document: int) -> tuple[str, int]:
        """(path, line number). Called only when all documents are added."""
        if not self._ends:
            self._paths = [path for path, count in self.num_documents.items() if count]
            self._ends = list(accumulate(self.num_documents[path] for path in self._paths))
        return self._paths[bisect_right(self._ends, document)], self.lines[document]


def dedup(args: argparse.Namespace) -> None:
    import numpy as np

    from data_tools.manifest import write_manifest
    from data_tools.reader import expand

    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # --workers says how many cores are used, not the library's own thread pool
    paths = expand(args.input, args.format)
    folder = _check(args, paths)
    with tempfile.TemporaryFile(dir=folder) as rows_file:
        places, num_malformed = _hash_all(args, paths, rows_file)
        rows = _mapped(rows_file, args, len(places.lines))
        firsts = _firsts(args, rows, places)
        sizes = np.bincount(firsts, minlength=1)
        num_written = int((sizes > 0).sum())
        counts = {
            "documents_in": len(places.lines) + num_malformed, "written": num_written, "duplicates": len(places.lines) - num_written,
            "malformed": num_malformed, "clusters": int((sizes > 1).sum()), "largest_cluster": int(sizes.max()),
        }  # fmt: skip
        if not args.dry_run:
            outputs = _copy(args, places, firsts, rows)
            write_manifest(args.output, "dedup", vars(args), paths, outputs, counts)
    print(
        f"{counts['documents_in']} documents in: {num_written} written, {counts['duplicates']} duplicates "
        f"in {counts['clusters']} clusters (largest {counts['largest_cluster']}), {num_malformed} malformed"
    )
    print("nothing was written (--dry-run)" if args.dry_run else args.output)


def _check(args: argparse.Namespace, paths: list[str]) -> str:
    """Judges the names before any work; returns the folder of the output."""
    from data_tools.files import need
    from data_tools.records import check_output

    check_output(args.output, paths)
    if args.duplicates:
        check_output(args.duplicates, [*paths, args.output], "--duplicates")
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise UsageError("--input names a file twice; every document of it would be a copy")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} is below 0")
    if args.method == "minhash":
        need("rensa", "--method minhash")
    folder = os.path.dirname(os.path.abspath(args.output))
    os.makedirs(folder, exist_ok=True)
    return folder


def _hash_all(args: argparse.Namespace, paths: list[str], rows_file) -> tuple[Places, int]:
    """Writes the rows of all documents; returns where they stand, and the number of malformed ones."""
    from data_tools.progress import Progress
    from data_tools.reader import read_blocks
    from data_tools.records import report_problems, total_size
    from data_tools.workers import map_in_order

    places, num_malformed = Places(paths), 0
    blocks = read_blocks(paths, args.format, [args.json_key])
    with Progress("dedup: hashing", total_size(paths), args.quiet) as progress:
        for path, numbers, rows, num_bytes, problems in map_in_order(Hasher, (args,), blocks, args.workers):
            report_problems(problems, args.on_error, num_malformed)
            num_malformed += len(problems)
            places.add(path, numbers)
            rows_file.write(rows)
            progress.add(num_bytes, len(numbers))
    rows_file.flush()
    return places, num_malformed


def _mapped(rows_file, args: argparse.Namespace, num_documents: int):
    """The rows as an array on disk: [num_documents, 2] uint64 or [num_documents, num_perm] uint32."""
    import numpy as np

    dtype, width = (np.uint64, 2) if args.method == "exact" else (np.uint32, args.num_perm)
    if num_documents == 0:
        return np.zeros((0, width), dtype)
    return np.memmap(rows_file, dtype, "r", shape=(num_documents, width))


def _firsts(args: argparse.Namespace, rows, places: Places):
    """int64 [num_documents]: the first document of the cluster of each."""
    from data_tools import minhash

    if args.method == "exact":
        return minhash.first_of_equal(rows)
    bands = minhash.choose_bands(args.threshold, args.num_perm, args.bands)
    print(
        f"{bands.num_bands} bands of {bands.num_rows}: pairs of similarity {args.threshold:g} are found with probability "
        f"{bands.recall(args.threshold):.3f}, of {args.threshold / 2:g} tested with {bands.recall(args.threshold / 2):.3f}"
    )
    pairs = minhash.similar_pairs(rows, bands, args.threshold, args.verify == "estimate")
    if args.verify == "exact":
        pairs = pairs[_jaccard(args, places, pairs) >= args.threshold]
    return minhash.first_of_cluster(pairs, rows.shape[0])


def _jaccard(args: argparse.Namespace, places: Places, pairs):
    """The true Jaccard similarity of each pair, from the n-grams of the documents in pairs, which are held in memory."""
    import numpy as np

    from data_tools.reader import parse_block, read_blocks
    from data_tools.words import ngrams, split_words

    needed = np.zeros(len(places.lines), bool)
    needed[pairs] = True
    sets = {}
    for block, found in places.numbered(read_blocks(list(places.num_documents), args.format, [args.json_key]), args.json_key):
        chosen = [(document, number) for document, number, _ in found if needed[document]]
        if chosen:
            lines, (texts,), _ = parse_block(block, [args.json_key])
            by_line = dict(zip(lines, texts))
            hashes, _, offsets = ngrams(split_words([by_line[number] for _, number in chosen]), args.ngram, short=True)
            for i, (document, _) in enumerate(chosen):
                sets[document] = np.unique(hashes[offsets[i] : offsets[i + 1]])
    shared = np.array([np.intersect1d(sets[a], sets[b], assume_unique=True).size for a, b in pairs.tolist()], np.float64)
    sizes = np.array([sets[a].size + sets[b].size for a, b in pairs.tolist()], np.float64)
    return shared / np.maximum(sizes - shared, 1)


def _copy(args: argparse.Namespace, places: Places, firsts, rows) -> list[str]:
    """Writes what stays and lists what goes; returns the paths written."""
    import numpy as np

    from data_tools.progress import Progress
    from data_tools.reader import read_blocks
    from data_tools.records import RecordWriter, total_size

    paths = list(places.num_documents)
    is_first = (firsts == np.arange(firsts.size)).astype(np.uint8).tobytes()
    removed = RecordWriter(args.duplicates) if args.duplicates else nullcontext()
    with Progress("dedup: writing", total_size(paths), args.quiet) as progress, RecordWriter(args.output) as kept, removed:
        for block, found in places.numbered(read_blocks(paths, args.format), args.json_key):
            for document, _, raw in found:
                if is_first[document]:
                    kept.write(raw)
                elif args.duplicates:
                    removed.write(_removed(args, places, document, int(firsts[document]), rows))
            progress.add(block.num_bytes, len(found))
    return [args.output, args.duplicates] if args.duplicates else [args.output]


def _removed(args: argparse.Namespace, places: Places, document: int, first: int, rows) -> bytes:
    import orjson

    (path, line), (kept_path, kept_line) = places.place(document), places.place(first)
    similarity = 1.0 if args.method == "exact" else float((rows[document] == rows[first]).mean())
    return orjson.dumps({"file": path, "line": line, "kept_file": kept_path, "kept_line": kept_line, "similarity": round(similarity, 4)})


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), dedup, argv)


if __name__ == "__main__":
    sys.exit(main())
