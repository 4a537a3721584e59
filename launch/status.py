"""Status: python launch/status.py RUN... [--json] | RUN --tail [RANK]

One line for each run folder: state, step, loss, tokens per second, time since its last line, and, under Slurm, the job, what squeue says of it
and how often it was started again. --tail follows the log of a rank (0 if none is named), also across restarts, until Ctrl-C.
Exit codes: 0 done, 1 a folder holds no run, 2 usage.
"""

import argparse
import json
import signal
import sys
from pathlib import Path


def main() -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)      # what reads it (head) may have enough
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run.dir of a run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--tail", metavar="RANK", nargs="?", type=int, const=0, help="follow the log of a rank")
    how.add_argument("--json", action="store_true", help="the same as a list of objects")
    args = parser.parse_intermixed_args()
    if args.tail is not None and len(args.runs) > 1:
        parser.error("--tail follows one run")

    from engine import status

    try:
        if args.tail is not None:
            status.follow(status.rank_log(args.runs[0], args.tail), lambda line: print(line, flush=True))
        rows = [row for path in args.runs for row in status.rows_of(path)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    print(json.dumps(rows, indent=2) if args.json else status.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
