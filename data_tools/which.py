"""Which documents a step of a run was trained on: corpus, document, tokens, and the line of the input file where the corpus knows it.

  python data_tools/which.py runs/base --step 1200                 # all samples of the step
  python data_tools/which.py runs/base --step 1200 --rank 3 --text # what rank 3 read, decoded
  python data_tools/which.py runs/base --step 1200 --json          # a line of JSON per sample
  python data_tools/which.py runs/base --samples 9600-9607         # by number, as a message about a loss names them

Reads the configuration that the run's newest checkpoint was trained with (RUN/config.yaml for later steps), the step's line of metrics.jsonl
for the samples it consumed (so ramp-ups and resumed runs are told as they were; a step that is not there yet is told as planned) and
RUN/env.json for the ranks. Runs on plain text only; of a ladder of long_context, RUN is the folder of a rung. Where the corpora have
relative names, start it in the folder in which the run was started. Files and lines need PREFIX.origins (data_tools/preprocess.py).
Left out: conversations, pairs and prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.cli import UsageError, positive, run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="which.py", description="Name the documents that a step of a run was trained on.")
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=positive, metavar="N", help="the step, counted from 1 as in metrics.jsonl")
    what.add_argument("--samples", type=_range, metavar="FIRST-LAST", help="instead of a step: samples by number, as the newest configuration reads them")
    parser.add_argument("--rank", type=int, metavar="R", help="only what this rank of the run read (all ranks of a replica read the same)")
    parser.add_argument("--text", action="store_true", help="print the text too, decoded by data.tokenizer (ids where the run has none)")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample")
    return parser


def which(args: argparse.Namespace) -> None:
    from engine.data import text
    from engine.rollback import read as read_rollbacks

    folder = Path(args.run)
    run = _config(folder, args.step)
    if args.samples and args.rank is not None:
        raise UsageError("--rank is of a step; leave it out with --samples")
    first, size, is_planned = (*args.samples, False) if args.samples else _position(folder, run, args.step)
    dataset, _ = text.datasets(run, max(_planned_samples(run), first + size), 0)
    numbers = _share(folder, run, dataset, first, size, args.rank)
    decode = _decoder(run) if args.text else None
    if args.step and not args.json:
        for gone_back in read_rollbacks(folder):
            if gone_back.next_sample == first:
                print(f"before it samples {gone_back.first_sample} to {first - 1} were passed over: the run went back from step {gone_back.at_step} "
                      f"to {gone_back.to_step}, since {gone_back.why}")
        share = f", of which rank {args.rank} reads {len(numbers)}" if args.rank is not None else ""
        print(f"step {args.step}: samples {first} to {first + size - 1}{share}{' (as planned: the step is not in metrics.jsonl)' if is_planned else ''}")
    for found in _found(dataset, numbers, decode):
        of_step = {"step": args.step} if args.step else {}
        print(json.dumps({**of_step, **found}, ensure_ascii=False) if args.json else _shown(found))


def _range(text: str) -> tuple[int, int]:
    """FIRST-LAST as (first, how many)."""
    first, dash, last = text.partition("-")
    if not (first.isdigit() and (last.isdigit() or not dash)) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIRST-LAST, such as 9600-9607")
    return int(first), int(last or first) - int(first) + 1


def _config(folder: Path, step: int | None):
    from omegaconf import OmegaConf

    from engine.config import RunConfig
    from engine.data.indexed import DataError
    from engine.run_folder import find
    from engine.stages import STAGES, TEXT

    path, written = folder / "config.yaml", find(folder / "checkpoints")
    if written and step and step <= int(written.name.removeprefix("iter_")):
        path = written / "config.yaml"      # RUN/config.yaml is of the last start, which need not have gone well
    if not path.is_file():
        raise UsageError(f"{folder} is no folder of a run: it has no config.yaml (of a ladder, name one of its rungs)")
    try:
        run = RunConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    except Exception as error:  # whatever a damaged file makes yaml or pydantic raise
        raise DataError(f"{path} cannot be read as a configuration ({type(error).__name__}: {error})") from None
    if run.stage in STAGES and run.stage not in TEXT:
        raise UsageError(f"{folder} is a run of stage {run.stage}, which reads conversations; which.py names documents of {', '.join(TEXT)}")
    # The folder may have been moved since; its index cache moved along.
    return run.model_copy(update={"run": run.run.model_copy(update={"dir": str(folder)})})


def _planned_samples(run) -> int:
    from engine import schedule

    return schedule.consumed_samples_after(schedule.planned_steps(run.train), run.train)


def _position(folder: Path, run, step: int) -> tuple[int, int, bool]:
    """(first sample, samples, False) of a step that metrics.jsonl holds; (..., True) of one that the schedule says is to come."""
    from engine import schedule
    from engine.log import read_metrics
    from engine.rollback import read as read_rollbacks

    records = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    record = next((record for record in records if record["step"] == step), None)
    if record is not None:
        return record["consumed_samples"] - record["global_batch"], record["global_batch"], False
    planned = schedule.planned_steps(run.train)
    if step > planned:
        raise UsageError(f"--step {step}: the run has steps 1 to {planned}")
    done = [record for record in records if record["step"] < step][-1:]
    at, consumed = (done[0]["step"], done[0]["consumed_samples"]) if done else _start(run)
    consumed = max([consumed, *(gone_back.next_sample for gone_back in read_rollbacks(folder) if gone_back.to_step == at)])
    if at >= step:
        raise UsageError(f"--step {step}: the run began after step {at} of {run.checkpoint.load}, which has its own folder")
    for _ in range(at, step - 1):
        consumed += schedule.global_batch(consumed, run.train)
    return consumed, schedule.global_batch(consumed, run.train), True


def _start(run) -> tuple[int, int]:
    """Step and samples of a run that has no record yet."""
    if not (run.checkpoint.load and run.checkpoint.load_optimizer and run.checkpoint.load_position):
        return 0, 0
    from engine.config import ConfigError
    from engine.stages import loaded

    try:
        position = loaded.position(loaded.folder(run))
    except ConfigError as error:
        raise UsageError(f"where the run begins is not known: {error.problems[0]}") from None
    return position["step"], position["consumed_samples"]


def _share(folder: Path, run, dataset, first: int, size: int, rank: int | None) -> list[int]:
    """The sample numbers of the step, or of one rank's part of it, in the order in which they are read."""
    if rank is None:
        return list(range(first, first + size))
    from engine.data.loader import Loader

    try:
        environment = json.loads((folder / "env.json").read_text())
        world_size, dp = environment["world_size"], environment["dp_size"]
    except (ValueError, KeyError) as error:
        raise UsageError(f"--rank: {folder / 'env.json'} does not say how many ranks there were ({error}); leave --rank out") from None
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank}: the run, as it was last started, had ranks 0 to {world_size - 1}")
    dp_rank = rank // (run.parallel.tp * run.parallel.cp) % dp      # the order of ranks is tp-cp-ep-dp-pp
    return Loader(dataset, run.train.micro_batch, dp_rank, dp).sample_numbers(first, size).reshape(-1).tolist()


def _found(dataset, numbers: list[int], decode) -> Iterator[dict]:
    import numpy as np

    from data_tools.origins import Origins
    from engine.data.ledger import source_numbers
    from engine.data.orders import sources_of

    samples, sources, origins = dataset.samples, sources_of(dataset.samples), {}
    for number, k in zip(numbers, source_numbers(samples, np.array(numbers, dtype=np.int64)).tolist()):
        corpus = sources[k].corpus
        if k not in origins:
            origins[k] = Origins.open(corpus.prefix)
        documents = [_document(corpus, origins[k], decode, *part) for part in samples.documents_of(number)]
        found = {"sample": number, "source": str(corpus.prefix), "documents": documents}
        if decode and dataset.fim:
            batch = dataset.batch(np.array([number]))
            found["trained_text"] = decode([*batch["tokens"][0].tolist(), int(batch["labels"][0, -1])])
        yield found


def _document(corpus, origins, decode, document: int, offset: int, count: int) -> dict:
    found = {"document": document, "first_token": offset, "num_tokens": count}
    if origins is not None:
        found["file"], found["line"] = origins.document(document)
    if decode:
        found["text"] = decode(corpus.get(document, offset, count).tolist())
    return found


def _shown(found: dict) -> str:
    lines = [f"sample {found['sample']}: {found['source']}"]
    for part in found["documents"]:
        origin = f"  {part['file']}:{part['line']}" if "file" in part else ""
        lines.append(f"  document {part['document']}, tokens {part['first_token']} to {part['first_token'] + part['num_tokens'] - 1}{origin}")
        lines += [part["text"]] if "text" in part else []
    return "\n".join(lines + (["  as trained, with its middle filled in:", found["trained_text"]] if "trained_text" in found else []))


def _decoder(run):
    if not run.data.tokenizer:
        return lambda ids: " ".join(map(str, ids))
    from data_tools.tokenizer import decode_marked, fim_marks, load_tokenizer

    tokenizer, marks = load_tokenizer(run.data.tokenizer), fim_marks(run)
    return lambda ids: decode_marked(tokenizer, ids, marks)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), which, argv)


if __name__ == "__main__":
    sys.exit(main())
