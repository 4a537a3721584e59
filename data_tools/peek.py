"""Shows what a corpus holds, or what a run trains on: a summary, one document, or one training sample with its masks.

  python data_tools/peek.py work/web_text_document --tokenizer hf:work/tokenizer --document 7
  python data_tools/peek.py work/web_text_document --tokenizer bytes --sample 0 --seq-len 256 --num-samples 1000 --seed 1234
  python data_tools/peek.py config.yaml --sample 5000 --set train.seq_len=4096

A sample of a corpus is the one that pretraining with the same split, seq-len, number of samples and seed sees at that number; with
--eod-id, --reset-at-eod and --eod-mask-loss it is shown as the loss sees it. With a run's configuration the sample is that of the
run's whole mixture, phases and all, or of its conversations: the corpus it comes from, where documents begin, which labels count.
Only what is shown is read and checked; --verify looks at the whole .idx first. Without a tokenizer ids are printed.
Left out: stages whose batches hold prompts or pairs; searching.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.cli import UsageError, positive, run_tool

SPLIT_NAMES = ("train", "valid", "test")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peek.py", description="Print a corpus's summary, a document, or a training sample.")
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus (path without .bin/.idx, or an address such as s3://bucket/web), or a run's configuration (.yaml)")
    parser.add_argument("--verify", action="store_true", help="check every length, offset and document of the .idx first")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes of the configuration")
    parser.add_argument("--tokenizer", metavar="SPEC", help="decode with hf:DIR-or-tokenizer.json | sentencepiece:FILE | tiktoken:FILE | bytes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--document", type=int, metavar="N", help="print document N")
    which.add_argument("--sample", type=int, metavar="N", help="print training sample N")
    parser.add_argument("--seq-len", type=positive, metavar="S", help="tokens per sample (needed with --sample of a corpus)")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="samples the run asks for (default: one epoch, or what the configuration plans)")
    parser.add_argument("--seed", type=int, default=1234, help="the run's data seed (default: 1234)")
    parser.add_argument("--split", default="1", help="the run's split string (default: 1, all documents for training)")
    parser.add_argument("--split-name", choices=SPLIT_NAMES, default="train", help="which part of the split (default: train)")
    parser.add_argument("--eod-id", type=int, metavar="ID", help="the end-of-document id (default: the tokenizer's)")
    parser.add_argument("--reset-at-eod", action="store_true", help="show positions and segments as with data.reset_at_eod")
    parser.add_argument("--eod-mask-loss", action="store_true", help="show the loss mask as with data.eod_mask_loss")
    return parser


def peek(args: argparse.Namespace) -> None:
    if args.prefix.lower().endswith((".yaml", ".yml")):
        _peek_run(args)
        return
    from engine.data.storage import is_remote, open_corpus

    if args.set:
        raise UsageError(f"--set {args.set[0]} changes a configuration, and {args.prefix} is none (.yaml)")
    if args.sample is not None and args.seq_len is None:
        raise UsageError("--sample needs --seq-len, the tokens per sample of the run")
    corpus = open_corpus(args.prefix)
    if args.verify:
        corpus.verify()
    if args.document is not None:
        _print_document(corpus, args.document, _decoder(args.tokenizer))
    elif args.sample is not None:
        _print_sample(corpus, args)
    else:
        counts = f"{corpus.num_documents} documents, {len(corpus)} sequences, {corpus.num_tokens} tokens"
        greatest = "" if is_remote(args.prefix) else f", greatest id {corpus.max_token()}"  # it would fetch the whole .bin
        print(f"{counts}, {corpus.dtype.name}{greatest}")


def _decoder(spec: str | None, marks: Mapping[int, str] = {}):
    if spec is None:
        return lambda ids: " ".join(map(str, ids))
    from data_tools.tokenizer import decode_marked, load_tokenizer

    tokenizer = load_tokenizer(spec)
    return lambda ids: decode_marked(tokenizer, ids, marks)


def _print_document(corpus, number: int, show) -> None:
    if not 0 <= number < corpus.num_documents:
        raise UsageError(f"--document {number}: {corpus.prefix} has documents 0 to {corpus.num_documents - 1}")
    first, end = corpus.document(number)
    ids = [token for sequence in range(first, end) for token in corpus.get(sequence).tolist()]
    print(f"document {number}: {len(ids)} tokens in {end - first} sequences{_origin(corpus.prefix, first)}")
    print(show(ids))


def _origin(prefix: str, sequence: int) -> str:
    from data_tools.origins import Origins

    origins = Origins.open(prefix)
    return ", from {}:{}".format(*origins.document(sequence)) if origins else ""


def _print_sample(corpus, args: argparse.Namespace) -> None:
    import numpy as np

    from engine.data.pretraining import GPTSamples, split_documents

    show = _decoder(args.tokenizer)
    part = split_documents(len(corpus), args.split)[SPLIT_NAMES.index(args.split_name)]
    samples = GPTSamples(corpus, np.arange(part.start, part.stop), args.num_samples, args.seq_len, args.seed, args.split_name)
    _check_number(args.sample, len(samples))
    print(f"sample {args.sample} of {len(samples)}: {args.seq_len} tokens and one more as the last label")
    if args.reset_at_eod or args.eod_mask_loss:
        eod_id = _eod_id(args)
        from engine.data.text import NextToken

        _print_sources(samples, args.sample)
        _print_rows(NextToken(samples, eod_id, args.reset_at_eod, args.eod_mask_loss), args.sample, show)
        return
    for document, offset, count in samples.documents_of(args.sample):
        print(f"--- document {document}, tokens {offset} to {offset + count - 1}{_origin(corpus.prefix, document)}")
        print(show(corpus.get(document, offset, count).tolist()))


def _check_number(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise UsageError(f"--sample {number}: there are samples 0 to {count - 1}; ask for more with --num-samples")


def _eod_id(args: argparse.Namespace) -> int:
    if args.eod_id is not None:
        return args.eod_id
    from data_tools.tokenizer import load_tokenizer

    eod_id = load_tokenizer(args.tokenizer).eod_id if args.tokenizer else None
    if eod_id is None:
        raise UsageError("--reset-at-eod and --eod-mask-loss need --eod-id, or a --tokenizer that has an end-of-document token")
    return eod_id


def _peek_run(args: argparse.Namespace) -> None:
    from engine import schedule
    from engine.config import ConfigError, load_config
    from engine.stages import build_stage

    from data_tools.tokenizer import fim_marks

    if args.sample is None:
        raise UsageError("a configuration needs --sample N, the number of a training sample; peek into a corpus by its prefix")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run = load_config(args.prefix, args.set)
            if not run.data.cache_dir and not (Path(run.run.dir) / "index_cache").exists():  # to look at a run is not to begin it
                run = run.model_copy(update={"data": run.data.model_copy(update={"cache_dir": scratch})})
            stage = build_stage(run.stage)
            run = stage.configure(run)
        except ConfigError as error:
            raise UsageError(f"{args.prefix}: {error}") from None
        num_samples = args.num_samples or schedule.consumed_samples_after(schedule.planned_steps(run.train), run.train)
        dataset, _ = stage.datasets(run, max(num_samples, 1), 0)
        _check_number(args.sample, len(dataset))
        print(f"sample {args.sample} of the {num_samples} that the run asks for, stage {run.stage}")
        _print_sources(getattr(dataset, "samples", None), args.sample)
        _print_rows(dataset, args.sample, _decoder(args.tokenizer or run.data.tokenizer or None, fim_marks(run)))


def _print_sources(samples, number: int) -> None:
    """The documents that a sample of plain text is cut from."""
    if not hasattr(samples, "documents_of"):
        return
    source = samples
    if hasattr(samples, "source_of"):
        source = samples.datasets[samples.source_of(number)[0]]
    prefix = source.corpus.prefix
    for document, offset, count in samples.documents_of(number):
        print(f"--- {prefix}: document {document}, tokens {offset} to {offset + count - 1}{_origin(prefix, document)}")


def _print_rows(dataset, number: int, show) -> None:
    """The labels of a sample in runs of one document and one loss mask; the first token of a row is never a label."""
    import numpy as np

    batch = {name: values.numpy() for name, values in dataset.batch(np.array([number])).items() if hasattr(values, "numpy")}
    if not {"tokens", "labels", "loss_mask"} <= batch.keys() or batch["labels"].ndim != 2:
        raise UsageError(f"samples of this stage are no rows of tokens and labels ({', '.join(sorted(batch))}), so peek cannot show them")
    for row in range(len(batch["tokens"])):
        mask = batch["loss_mask"][row] > 0
        segments = batch["segment_ids"][row] if "segment_ids" in batch else np.zeros(mask.size, int)
        positions = batch["position_ids"][row] if "position_ids" in batch else np.arange(mask.size)
        beginning = show(batch["tokens"][row, :1].tolist())
        print(f"row of {mask.size} tokens in {np.unique(segments).size} segments, {mask.sum()} labels count; it begins with: {beginning}")
        is_new = np.flatnonzero((np.diff(mask.astype(int)) != 0) | (np.diff(segments) != 0)) + 1
        for begin, end in zip([0, *is_new.tolist()], [*is_new.tolist(), mask.size]):
            what = "labels that count" if mask[begin] else "labels without loss"
            print(f"--- {begin} to {end - 1}, segment {segments[begin]}, positions {positions[begin]} to {positions[end - 1]}: {what}")
            print(show(batch["labels"][row, begin:end].tolist()))


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), peek, argv)


if __name__ == "__main__":
    sys.exit(main())
