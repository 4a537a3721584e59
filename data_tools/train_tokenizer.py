"""Trains a byte-level BPE tokenizer; writes a folder that transformers.AutoTokenizer and `hf:DIR` here both load.

  python data_tools/train_tokenizer.py --input web.jsonl.gz book.txt --vocab-size 8192 --output work/tokenizer

In: the same JSON lines and text files as preprocess.py. Out: tokenizer.json and tokenizer_config.json, with `<|endoftext|>`
(id 0) as end-of-document and padding token. Every byte has an id, so no text is unknown.
Left out: other algorithms, chat templates, further special tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.cli import UsageError, positive, run_tool

END_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end token


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_tokenizer.py", description="Train a byte-level BPE tokenizer.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines or text files; .gz works")
    parser.add_argument("--vocab-size", type=positive, required=True, metavar="N", help=f"number of ids, at least {MIN_VOCAB_SIZE}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="the key that holds the text (default: text)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do at a malformed document (default: stop)")
    parser.add_argument("--format", choices=("auto", "jsonl", "text"), default="auto", help="input format (default: by the file's suffix)")
    return parser


def read_texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts of all inputs; malformed documents are listed on stderr and stop the run unless --on-error skip."""
    from data_tools.reader import parse, read_chunks
    from engine.data.indexed import DataError

    num_malformed = 0
    for chunk in read_chunks(args.input, args.format):
        texts, problems = parse(chunk, args.json_key)
        for problem in problems:
            print(problem, file=sys.stderr)
        num_malformed += len(problems)
        if problems and args.on_error == "stop":
            raise DataError(f"{len(problems)} malformed documents, the first at {problems[0]}; mend them, or leave them out with --on-error skip")
        yield from (text for _, text in texts)
    if num_malformed:
        print(f"{num_malformed} malformed documents were left out", file=sys.stderr)


def train(args: argparse.Namespace) -> None:
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"--vocab-size {args.vocab_size} is below {MIN_VOCAB_SIZE}, the 256 bytes and {END_TOKEN}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(args), trainer)
    save(tokenizer, Path(args.output))
    size = tokenizer.get_vocab_size()
    print(f"{size} ids -> {args.output}")
    if size < args.vocab_size:
        print(f"warning: the text gave {size} ids, not {args.vocab_size}; use more text for a larger vocabulary", file=sys.stderr)


def save(tokenizer, folder: Path) -> None:
    """Writes both files under temporary names, then renames; tokenizer.json comes last and marks the folder complete."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,  # decoding must give back the text byte for byte
    }
    contents = {"tokenizer_config.json": json.dumps(config, indent=2) + "\n", "tokenizer.json": tokenizer.to_str(pretty=True)}
    for name, text in contents.items():
        temporary = folder / f"{name}.tmp{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())
