"""Trains a tokenizer: a byte-level BPE, or a SentencePiece BPE with byte fallback.

  python data_tools/train_tokenizer.py --input web.jsonl.gz books/ --vocab-size 8192 --output work/tokenizer
  python data_tools/train_tokenizer.py --input web.jsonl.gz --kind sentencepiece --vocab-size 8192 --output work/tokenizer

In: the same files as preprocess.py. Out, for a byte-level BPE: a folder with tokenizer.json and tokenizer_config.json, which
transformers.AutoTokenizer and `hf:DIR` here both load, with `<|endoftext|>` (id 0) as end-of-document and padding token. For
SentencePiece: a folder with tokenizer.model, for `sentencepiece:DIR/tokenizer.model`, with `</s>` (id 2) as end of document; text is
kept as it is, white space too. Every byte has an id in both, so no text is unknown. Beside the model lies its manifest.
Left out: unigram models, chat templates, further special tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.cli import UsageError, positive, run_tool

END_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end token
SENTENCE_CHARACTERS = 1000  # the trainer's limit is 4192 bytes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_tokenizer.py", description="Train a tokenizer.")
    inputs = "files, folders and globs of JSON lines, Parquet or text; .gz and .zst work"
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=inputs)
    kinds = "byte-level BPE, or SentencePiece BPE with byte fallback (default: bpe)"
    parser.add_argument("--kind", choices=("bpe", "sentencepiece"), default="bpe", help=kinds)
    parser.add_argument("--vocab-size", type=positive, required=True, metavar="N", help=f"number of ids, at least {MIN_VOCAB_SIZE}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the tokenizer's files")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="the key that holds the text (default: text)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at a malformed document (default: stop)")
    parser.add_argument("--format", choices=("auto", "jsonl", "text", "parquet"), default="auto", help="input format (default: by the file's suffix)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def read_texts(args: argparse.Namespace, paths: list[str], counts: Counter) -> Iterator[str]:
    """The texts of all inputs, counted; malformed documents are listed on stderr and stop the run unless --on-error skip."""
    from data_tools.progress import Progress
    from data_tools.reader import parse_block, read_blocks
    from data_tools.records import total_size
    from engine.data.indexed import DataError

    with Progress("train_tokenizer: reading", total_size(paths), args.quiet) as progress:
        for block in read_blocks(paths, args.format, [args.json_key]):
            _, (texts,), problems = parse_block(block, [args.json_key])
            for problem in problems:
                print(problem, file=sys.stderr)
            counts.update(documents=len(texts), malformed=len(problems))
            if problems and args.on_error == "stop":
                raise DataError(f"{len(problems)} malformed documents, the first at {problems[0]}; mend them, or leave them out with --on-error skip")
            yield from texts
            progress.add(block.num_bytes, len(texts))
    if counts["malformed"]:
        print(f"{counts['malformed']} malformed documents were left out", file=sys.stderr)


def train(args: argparse.Namespace) -> None:
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"--vocab-size {args.vocab_size} is below {MIN_VOCAB_SIZE}, the 256 bytes and {END_TOKEN}")
    from data_tools.files import expand
    from data_tools.manifest import write_manifest

    paths, counts, folder = expand(args.input, args.format), Counter(), Path(args.output)
    make, names = (train_sentencepiece, ["tokenizer.model"]) if args.kind == "sentencepiece" else (train_bpe, ["tokenizer_config.json", "tokenizer.json"])
    size = make(read_texts(args, paths, counts), args.vocab_size, folder)
    write_manifest(folder / names[-1], "train_tokenizer", vars(args), paths, [folder / name for name in names], dict(counts) | {"ids": size})
    print(f"{size} ids -> {args.output}")
    if size < args.vocab_size:
        print(f"warning: the text gave {size} ids, not {args.vocab_size}; use more text for a larger vocabulary", file=sys.stderr)


def train_bpe(texts: Iterator[str], vocab_size: int, folder: Path) -> int:
    """Trains and saves; returns the number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,  # decoding must give back the text byte for byte
    }
    contents = {"tokenizer_config.json": json.dumps(config, indent=2) + "\n", "tokenizer.json": tokenizer.to_str(pretty=True)}
    save({name: text.encode("utf-8") for name, text in contents.items()}, folder)
    return tokenizer.get_vocab_size()


def train_sentencepiece(texts: Iterator[str], vocab_size: int, folder: Path) -> int:
    """Trains and saves; returns the number of ids. Raises DataError when the text does not give as many."""
    from io import BytesIO

    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    from engine.data.indexed import DataError

    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,  # what is rarer is written in bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if isinstance(error.__context__, DataError):
            raise error.__context__ from None
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"SentencePiece cannot train {vocab_size} ids on this text ({reason}); use more text, or a smaller --vocab-size") from None
    save({"tokenizer.model": model.getvalue()}, folder)
    return SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines in pieces that the trainer takes: it passes over longer ones without a word."""
    for text in texts:
        for line in text.splitlines():
            for begin in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[begin : begin + SENTENCE_CHARACTERS]


def save(contents: dict[str, bytes], folder: Path) -> None:
    """Writes files under temporary names, then renames; the last marks the folder complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        temporary = folder / f"{name}.tmp{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())
