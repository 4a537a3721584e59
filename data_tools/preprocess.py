"""Text to a tokenised corpus: JSON lines, Parquet or text files in, PREFIX_KEY_document.bin and .idx out, byte for byte Megatron's.

  python data_tools/preprocess.py --input 'web/*.jsonl.gz' books/ --output-prefix work/web --tokenizer hf:work/tokenizer --append-eod

Blocks of raw lines are read here, parsed and tokenised in worker processes, and written here in input order, so the output
does not depend on the number of workers. Every document is written, or reported with its file and line in PREFIX_report.jsonl.
The output appears under its name only when it is complete; the same command goes on where an interrupted one stopped.
docs/preprocess.md tells the formats, the fast path and what can be asked of the result.

Left out: sentence splitting, filtering and deduplication.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from data_tools.cli import UsageError, positive, run_tool

MAX_LISTED = 20  # problems printed; the report has all


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="preprocess.py", description="Tokenise text into a corpus of two files, .bin and .idx.")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="files, folders and globs, in this order: JSON lines (a document per line), Parquet (per row), text (per file); .gz and .zst work",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx, and P_report.jsonl")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="hf:DIR-or-tokenizer.json | sentencepiece:FILE | tiktoken:FILE | bytes")
    parser.add_argument("--json-key", nargs="+", default=["text"], metavar="KEY", help="the keys or columns that hold text, a corpus each (default: text)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document id")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at a malformed document (default: stop)")
    parser.add_argument("--format", choices=("auto", "jsonl", "text", "parquet"), default="auto", help="input format (default: by the file's suffix)")
    parser.add_argument(
        "--fast", choices=("auto", "off"), default="auto", help="tokenise with gigatoken where it gives the tokenizer's own ids, as checked on the corpus"
    )
    parser.add_argument("--keep-offsets", action="store_true", help="keep the character at which each token begins (data_tools/origins.py)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def preprocess(args: argparse.Namespace) -> None:
    # Set before the library is loaded: --workers says how many cores are used, not the library's own thread pool.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from data_tools.encode import Options, check_eod
    from data_tools.fast import NoFastPath
    from data_tools.files import expand, input_format
    from data_tools.tokenizer import load_tokenizer
    from data_tools.work import Work
    from engine.data.indexed import optimal_dtype

    started = time.perf_counter()
    paths = expand(args.input, args.format)
    keys = tuple(dict.fromkeys(args.json_key))
    if len(keys) > 1 and "text" in (kinds := [input_format(path, args.format) for path in paths]):
        raise UsageError(f"--json-key {' '.join(keys)}: {paths[kinds.index('text')]} is a text file, which has no keys; give the keys' files alone")
    options = Options(args.tokenizer, keys, args.append_eod, args.keep_offsets, args.fast == "auto")
    tokenizer = load_tokenizer(args.tokenizer)
    check_eod(options, tokenizer)
    identity = {"inputs": _inputs_hash(paths), "format": args.format, "tokenizer": _tokenizer_hash(args.tokenizer)}
    identity |= {"keys": keys, "append_eod": args.append_eod, "keep_offsets": args.keep_offsets, "version": 1}
    work = Work(args.output_prefix, keys, optimal_dtype(tokenizer.vocab_size), args.keep_offsets, identity)
    if work.started_anew:
        print(f"{work.folder} was made from other input, options or tokenizer; starting anew", file=sys.stderr)
    elif work.has_pieces:
        print(f"going on after {work.state['documents']} documents, {work.state['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    hashing = hash_in_background(paths, min(args.workers, 8))
    try:
        try:
            fill(work, paths, options, tokenizer, args)
        except NoFastPath as reason:
            print(f"fast path left: {reason}; starting again with the tokenizer's own library", file=sys.stderr)
            work.clear()
            fill(work, paths, Options(**{**vars(options), "is_fast": False}), tokenizer, args)
        counts = dict(work.state)
        outputs = work.finish()
        hashing.shutdown()
        write_manifests(args, keys, paths, outputs, counts)
        work.remove()
    except KeyboardInterrupt:
        hashing.shutdown(cancel_futures=True)
        work.close()
        print("the same command goes on after the last finished piece", file=sys.stderr)
        raise
    except BaseException:
        hashing.shutdown(cancel_futures=True)
        work.close()
        if not work.has_pieces:
            work.remove()
        raise
    seconds = time.perf_counter() - started
    print(f"{summary(counts)}; {work.dtype.name}, {seconds:.1f} s, {counts['bytes'] / 1e6 / seconds:.1f} MB/s of input")
    print("\n".join(outputs))


def fill(work, paths: list[str], options, tokenizer, args: argparse.Namespace) -> None:
    """Tokenises what is still missing."""
    from data_tools.encode import Encoder
    from data_tools.progress import Progress
    from data_tools.reader import Position, read_blocks
    from data_tools.workers import map_in_order
    from engine.data.indexed import DataError

    if work.state["is_complete"]:
        return
    blocks = read_blocks(paths, args.format, options.json_keys, Position(*work.state["position"]))
    total_bytes = sum(os.stat(path).st_size for path in paths)
    was_told, num_listed = False, 0
    with Progress("preprocess", total_bytes - work.state["bytes"], quiet=args.quiet) as progress:
        for encoded in map_in_order(Encoder, (options, tokenizer if args.workers == 1 else None), blocks, args.workers):
            if encoded.no_fast_path and not was_told:
                print(f"no fast path: {encoded.no_fast_path}", file=sys.stderr)
                was_told = True
            for problem in encoded.problems[: MAX_LISTED - num_listed]:
                print(problem, file=sys.stderr)
                num_listed += 1
            if encoded.problems and args.on_error == "stop":
                raise DataError(
                    f"{len(encoded.problems)} malformed documents, the first at {encoded.problems[0]}; "
                    "nothing was written: mend them, or leave them out with --on-error skip"
                )
            work.append(encoded)
            progress.add(num_bytes=encoded.num_bytes, num_documents=encoded.lines.size, num_tokens=sum(c.tokens.size for c in encoded.columns))
    if work.state["malformed"] > num_listed:
        print(f"... and {work.state['malformed'] - num_listed} more, in {work.report}", file=sys.stderr)
    if work.state["tokens"] == 0:
        raise DataError(f"{summary(work.state)}: no document is left to write; check --input and --json-key")


def summary(counts: dict) -> str:
    """documents in = documents written + reported, in words."""
    return (
        f"{counts['documents'] + counts['malformed']} documents in: {counts['documents']} written "
        f"({counts['tokens']} tokens, {counts['empty']} empty), {counts['malformed']} malformed"
    )


def write_manifests(args: argparse.Namespace, keys: Sequence[str], paths: list[str], outputs: list[str], counts: dict) -> None:
    """A manifest beside each corpus."""
    from data_tools.manifest import write_manifest
    from data_tools.tokenizer import files_of

    inputs = [*paths, *files_of(args.tokenizer)]
    numbers = {name: counts[name] for name in ("documents", "empty", "malformed", "tokens")}
    for key in keys:
        prefix = f"{args.output_prefix}_{key}_document"
        own = [path for path in outputs if path.startswith(f"{prefix}.") or path.endswith("_report.jsonl")]
        write_manifest(prefix, "preprocess", vars(args), inputs, own, numbers)


def hash_in_background(paths: list[str], num_threads: int) -> ThreadPoolExecutor:
    """Hashes inputs for the manifest while they are read anyway: the hash is remembered, and the disk is read once."""
    from data_tools.manifest import sha256

    pool = ThreadPoolExecutor(num_threads)
    for path in paths:
        pool.submit(sha256, path)
    return pool


def _inputs_hash(paths: list[str]) -> str:
    """Of names, sizes and times: one line, however many files there are."""
    stamps = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def _tokenizer_hash(spec: str) -> list[str]:
    from data_tools.manifest import sha256
    from data_tools.tokenizer import files_of

    return [spec.partition(":")[0], *(f"{file.name} {sha256(file)}" for file in files_of(spec))]


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
