"""The data path beside its peers: preprocessing, index building, blending, loading and deduplication, one table.

    python benchmarks/data.py [--rounds 7] [--only indices,blend] [--quick]

Each line of the table comes from benchmarks/_data_NAME.py, which says what is measured and on what input; NAME is what --only takes. Peer and ours
take turns in one run, the medians count, and CPU seconds stand beside those on the wall. A peer whose library is missing is named and left out.
--quick takes small inputs: it shows that everything runs, and its figures say nothing.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

NAMES = ("preprocess", "indices", "blend", "loader", "wait", "dedup")
HEADER = ("work", "peer", "peer s", "our s", "peer CPU s", "our CPU s", "ratio", "goal", "note")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names, comma-separated: " + ", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small inputs: shows that everything runs")
    arguments = parser.parse_args()
    asked = arguments.only.split(",") if arguments.only else list(NAMES)
    for name in asked:
        if name not in NAMES:
            parser.error(f"--only={arguments.only}: nothing is called {name!r}; there are {', '.join(NAMES)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")      # a peer's thread pool would be measured against one thread of ours
    sys.path.insert(0, str(Path(__file__).parents[1]))
    warnings.filterwarnings("ignore")                  # of megatron's imports
    for name in [name for name in asked if importlib.util.find_spec(f"_data_{name}") is None]:
        print(f"{name}: left out (no benchmarks/_data_{name}.py)", flush=True)
        asked.remove(name)
    rows = [row for name in asked for row in importlib.import_module(f"_data_{name}").rows(arguments.rounds, arguments.quick)]
    print("\n| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
    for row in rows:
        times = (row.peer_seconds, row.our_seconds, row.peer_cpu, row.our_cpu)
        cells = (row.work, row.peer, *("" if t is None else f"{t:.4g}" for t in times), row.ratio, row.goal, row.note)
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
