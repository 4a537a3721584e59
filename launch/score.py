"""Score: torchrun --nproc-per-node N launch/score.py CHECKPOINT --input chat.jsonl --output scored.jsonl [key=value ...]

Every conversation of the input gets `reward` from a reward model, or `logp` from a language model: the log-probability of what the
assistant says. Sizes, tokenizer and chat template are those of the run that wrote the checkpoint; key=value changes them, such as
parallel.tp=2 data.tokenizer=hf:DIR chat.template=chatml. Exit codes: 0 done, 1 error, 2 usage or configuration.
"""

import argparse
import os
import shutil
import sys

from engine.cli import ERROR, guarded, say
from engine.foreign import written_config
from engine.run_folder import find


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--input", required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_intermixed_args()
    folder = find(args.checkpoint)
    if folder is None:
        parser.error(f"{args.checkpoint} holds no complete checkpoint (iter_*/metadata.json)")
    work = f"{args.output}.work"
    size = 8 * 16 * int(os.environ.get("WORLD_SIZE", 1))  # a multiple that suits every layout; scoring has no global batch
    try:
        raw = written_config(folder)
    except (ValueError, OSError) as error:
        return say(f"error: {error}", ERROR)
    instead = {
        "run": {**raw["run"], "dir": work},
        "parallel": {},
        "data": {"train": [args.input], "tokenizer": raw["data"]["tokenizer"]},
        "train": {**raw["train"], "micro_batch": 8, "global_batch": size, "steps": 0, "eval_every": 0, "eval_samples": 0, "rampup": {}},
        "chat": {**raw["chat"], "too_long": "refuse"},
        "checkpoint": {"load": str(folder)},
        "average": {},
    }

    def score(run):
        from engine.score import score_file

        score_file(run, args.input, args.output)
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(work, ignore_errors=True)  # the tokens; every rank has read them

    return guarded(str(folder / "config.yaml"), args.overrides, score, instead=instead)


if __name__ == "__main__":
    sys.exit(main())
