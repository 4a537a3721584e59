"""Text to a tokenised corpus: JSON lines or plain text files in, PREFIX_KEY_document.bin and .idx out.

  python data_tools/preprocess.py --input web.jsonl.gz book.txt --output-prefix work/web --tokenizer hf:work/tokenizer --append-eod

Chunks of raw lines are read here, parsed and tokenised in worker processes, and written here in input order, so the output
does not depend on the number of workers. Every document is either written or reported with its file and line.
The output appears under its name only when it is complete.

Left out: sentence splitting, filtering and deduplication, several JSON keys at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from data_tools.cli import UsageError, positive, run_tool

MAX_LISTED = 1000  # problems printed one by one; the rest are counted


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="preprocess.py", description="Tokenise text into a corpus of two files, .bin and .idx.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines (a document per line) or text files (a document each); .gz works")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="hf:DIR-or-tokenizer.json | sentencepiece:FILE | tiktoken:FILE | bytes")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="the key that holds the text (default: text)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document id")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at a malformed document (default: stop)")
    parser.add_argument("--format", choices=("auto", "jsonl", "text"), default="auto", help="input format (default: by the file's suffix)")
    return parser


@dataclass(frozen=True)
class Encoded:
    """A chunk's tokens laid end to end, the length of each document, and what was not used."""

    tokens: bytes
    lengths: list[int]
    malformed: list = field(default_factory=list)
    empty: list = field(default_factory=list)


class Encoder:
    """Parses and tokenises chunks; one per process."""

    def __init__(self, spec: str, json_key: str, append_eod: bool) -> None:
        from data_tools.tokenizer import load_tokenizer
        from engine.data.indexed import optimal_dtype

        self.tokenizer = load_tokenizer(spec)
        self.json_key = json_key
        self.dtype = optimal_dtype(self.tokenizer.vocab_size)
        if append_eod and self.tokenizer.eod_id is None:
            raise UsageError(f"--append-eod: tokenizer {spec!r} names no end-of-document token; add eos_token to its tokenizer_config.json")
        self.ending = [self.tokenizer.eod_id] if append_eod else []

    def __call__(self, chunk) -> Encoded:
        import numpy as np

        from data_tools.reader import Problem, parse

        texts, malformed = parse(chunk, self.json_key)
        documents = self.tokenizer.encode_batch([text for _, text in texts])
        empty = [Problem(chunk.path, number, "empty document") for (number, _), ids in zip(texts, documents) if not ids]
        documents = [ids + self.ending for ids in documents if ids]
        lengths = [len(ids) for ids in documents]
        flat = np.fromiter(chain.from_iterable(documents), dtype=self.dtype, count=sum(lengths))
        return Encoded(flat.tobytes(), lengths, malformed, empty)


_encoder: Encoder | None = None  # one per worker process: loading a tokenizer costs more than a chunk


def _start_worker(*arguments) -> None:
    global _encoder
    _encoder = Encoder(*arguments)


def _encode(chunk) -> Encoded:
    return _encoder(chunk)


def encode_in_order(chunks: Iterable, encoder: Encoder, workers: int, arguments: tuple) -> Iterator[Encoded]:
    """Encodes chunks in `workers` processes; results come in input order, and few chunks are in memory at a time."""
    if workers == 1:
        yield from map(encoder, chunks)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from engine.data.indexed import DataError

    # spawn: a forked child would inherit the tokenizer library's thread pool in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, arguments)
    try:
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(f"one of {workers} worker processes was killed, most often for memory; use fewer with --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Report:
    """Counts of documents in and out; lists what was not used on stderr as it comes."""

    def __init__(self) -> None:
        self.num_written = self.num_malformed = self.num_empty = self.num_tokens = 0

    def add(self, encoded: Encoded) -> None:
        room = max(0, MAX_LISTED - self.num_malformed - self.num_empty)
        for problem in (encoded.malformed + encoded.empty)[:room]:
            print(problem, file=sys.stderr)
        self.num_malformed += len(encoded.malformed)
        self.num_empty += len(encoded.empty)
        self.num_written += len(encoded.lengths)
        self.num_tokens += sum(encoded.lengths)

    def __str__(self) -> str:
        num_in = self.num_written + self.num_malformed + self.num_empty
        return (
            f"{num_in} documents in: {self.num_written} written ({self.num_tokens} tokens), "
            f"{self.num_malformed} malformed, {self.num_empty} empty"
        )


def preprocess(args: argparse.Namespace) -> None:
    # Set before the library is loaded: --workers says how many cores are used, not the library's own thread pool.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np

    from data_tools.reader import input_format, read_chunks
    from engine.data.indexed import DataError, IndexedWriter

    started = time.perf_counter()
    num_bytes = 0
    for path in args.input:
        input_format(path, args.format)  # all names are judged before any work is done
        num_bytes += os.stat(path).st_size
    arguments = (args.tokenizer, args.json_key, args.append_eod)
    encoder = Encoder(*arguments)
    prefix = f"{args.output_prefix}_{args.json_key}_document"
    report = Report()
    with IndexedWriter(prefix, encoder.dtype) as writer:
        for encoded in encode_in_order(read_chunks(args.input, args.format), encoder, args.workers, arguments):
            report.add(encoded)
            if encoded.malformed and args.on_error == "stop":
                raise DataError(
                    f"{len(encoded.malformed)} malformed documents, the first at {encoded.malformed[0]}; "
                    "nothing was written: mend them, or leave them out with --on-error skip"
                )
            tokens = np.frombuffer(encoded.tokens, dtype=encoder.dtype)
            for document in np.split(tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths else []:
                writer.add_document(document)
        if report.num_written == 0:
            raise DataError(f"{report}: no document is left to write; check --input and --json-key")
    seconds = time.perf_counter() - started
    print(f"{report}; {encoder.dtype.name}, {seconds:.1f} s, {num_bytes / 1e6 / seconds:.1f} MB/s of input")
    print(f"{prefix}.bin .idx")


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), preprocess, argv)


if __name__ == "__main__":
    sys.exit(main())
