"""What is installed, what is used instead, how to get the rest: python launch/doctor.py [--folder DIR] [--json]

One screen: Python, packages, torch and its GPUs, megatron-core, Transformer Engine, apex, DALI, a self-test of the C++ core, of gloo and NCCL,
the speed of the disk, and /dev/shm. Exit codes: 0 training can run, 1 it cannot.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it must answer where nothing is installed yet

from engine.doctor import as_json, can_train, examine, screen  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where runs will be written (default: here)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args()
    findings = examine(args.folder, say=lambda text: print(text, file=sys.stderr, flush=True))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)      # what reads it (head) may have enough
    print(as_json(findings) if args.json else screen(findings))
    sys.exit(0 if can_train(findings) else 1)
