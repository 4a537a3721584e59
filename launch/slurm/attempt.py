"""Called by a job script of Slurm before its ranks start and after they have ended; launch/slurm/job.py writes such scripts.

    attempt.py begin RUN_DIR --max-restarts 3
    attempt.py end RUN_DIR --checked CODE --code CODE --then requeue --max-restarts 3 --max-requeues 100

begin: exit code 0 start the ranks, 3 nothing is left to do, 1 given up. end: writes what happened into RUN_DIR/slurm/attempts.jsonl and
requeues the job where that helps; its exit code is the job's (docs/launch.md). Needs no packages: the host's Python, 3.9 or newer, runs it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("begin")
    end = commands.add_parser("end")
    for command in (begin, end):
        command.add_argument("run_dir", type=Path)
        command.add_argument("--max-restarts", type=int, required=True, help="in a row without a newer checkpoint")
    end.add_argument("--checked", type=int, required=True, help="exit code of the check of the nodes")
    end.add_argument("--code", type=int, required=True, help="exit code of the ranks")
    end.add_argument("--then", choices=("requeue", "next", "nothing"), required=True, help="what follows an attempt that can be gone on with")
    end.add_argument("--max-requeues", type=int, required=True, help="in all")
    args = parser.parse_args()

    from functools import partial

    from engine.slurm import attempts

    say = partial(print, flush=True)
    if args.command == "begin":
        return attempts.begin(args.run_dir, args.max_restarts, say)
    return attempts.end(args.run_dir, args.checked, args.code, attempts.Limits(args.max_restarts, args.max_requeues, args.then), say)


if __name__ == "__main__":
    sys.exit(main())
