"""Shows what a corpus holds: a summary, one document, or one training sample with the documents it is cut from.

  python data_tools/peek.py work/web_text_document --tokenizer hf:work/tokenizer --document 7
  python data_tools/peek.py work/web_text_document --tokenizer bytes --sample 0 --seq-len 256 --num-samples 1000 --seed 1234

A sample is the one that pretraining with the same split, seq-len, number of samples and seed sees at that number.
Only what is shown is read and checked; --verify looks at the whole .idx first. Without --tokenizer ids are printed. Left out: blends (peek into each corpus), searching.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_tools.cli import UsageError, positive, run_tool

SPLIT_NAMES = ("train", "valid", "test")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peek.py", description="Print a corpus's summary, a document, or a training sample.")
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus (path without .bin/.idx, or an address such as s3://bucket/web)")
    parser.add_argument("--verify", action="store_true", help="check every length, offset and document of the .idx first")
    parser.add_argument("--tokenizer", metavar="SPEC", help="decode with hf:DIR-or-tokenizer.json | sentencepiece:FILE | tiktoken:FILE | bytes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--document", type=int, metavar="N", help="print document N")
    which.add_argument("--sample", type=int, metavar="N", help="print training sample N")
    parser.add_argument("--seq-len", type=positive, metavar="S", help="tokens per sample (needed with --sample)")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="samples the run asks for (default: one epoch)")
    parser.add_argument("--seed", type=int, default=1234, help="the run's data seed (default: 1234)")
    parser.add_argument("--split", default="1", help="the run's split string (default: 1, all documents for training)")
    parser.add_argument("--split-name", choices=SPLIT_NAMES, default="train", help="which part of the split (default: train)")
    return parser


def peek(args: argparse.Namespace) -> None:
    from engine.data.storage import open_corpus

    if args.sample is not None and args.seq_len is None:
        raise UsageError("--sample needs --seq-len, the tokens per sample of the run")
    corpus = open_corpus(args.prefix)
    if args.verify:
        corpus.verify()
    show = _decoder(args.tokenizer)
    if args.document is not None:
        _print_document(corpus, args.document, show)
    elif args.sample is not None:
        _print_sample(corpus, args, show)
    else:
        print(f"{corpus.num_documents} documents, {len(corpus)} sequences, {corpus.num_tokens} tokens, {corpus.dtype.name}, greatest id {corpus.max_token()}")


def _decoder(spec: str | None):
    if spec is None:
        return lambda ids: " ".join(map(str, ids))
    from data_tools.tokenizer import load_tokenizer
    from engine.data.indexed import DataError

    tokenizer = load_tokenizer(spec)

    def decode(ids: list[int]) -> str:
        if ids and max(ids) >= tokenizer.vocab_size:
            raise DataError(f"id {max(ids)} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}; the corpus was written with another tokenizer")
        return tokenizer.decode(ids)

    return decode


def _print_document(corpus, number: int, show) -> None:
    if not 0 <= number < corpus.num_documents:
        raise UsageError(f"--document {number}: {corpus.prefix} has documents 0 to {corpus.num_documents - 1}")
    first, end = corpus.document(number)
    ids = [token for sequence in range(first, end) for token in corpus.get(sequence).tolist()]
    print(f"document {number}: {len(ids)} tokens in {end - first} sequences")
    print(show(ids))


def _print_sample(corpus, args: argparse.Namespace, show) -> None:
    import numpy as np

    from engine.data.pretraining import GPTSamples, split_documents

    part = split_documents(len(corpus), args.split)[SPLIT_NAMES.index(args.split_name)]
    samples = GPTSamples(corpus, np.arange(part.start, part.stop), args.num_samples, args.seq_len, args.seed, args.split_name)
    if not 0 <= args.sample < len(samples):
        raise UsageError(f"--sample {args.sample}: there are samples 0 to {len(samples) - 1}; ask for more with --num-samples")
    print(f"sample {args.sample} of {len(samples)}: {args.seq_len} tokens and one more as the last label")
    for document, offset, count in samples.documents_of(args.sample):
        print(f"--- document {document}, tokens {offset} to {offset + count - 1}")
        print(show(corpus.get(document, offset, count).tolist()))


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), peek, argv)


if __name__ == "__main__":
    sys.exit(main())
