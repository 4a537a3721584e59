"""Faults on purpose, many times over: what docs/faults.md says was measured.

    python benchmarks/faults.py CAMPAIGN [--cases N] [--seed S]

Each campaign is a file benchmarks/_faults_CAMPAIGN.py, which opens with what it does; without a name they are listed. It prints lines of a table and
answers 1 when a case went wrong. The suite runs each with a few cases.
"""

import argparse
import ast
import importlib
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    files = {path.stem.removeprefix("_faults_"): path for path in sorted(HERE.glob("_faults_*.py"))}
    said = "\n".join(f"  {name:16}{ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}" for name, path in files.items())
    parser = argparse.ArgumentParser(description=f"Faults on purpose. Campaigns:\n{said}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=files)
    parser.add_argument("--cases", type=int, default=0, help="0: as many as the campaign takes by itself")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    warnings.filterwarnings("ignore")  # of megatron's imports
    return importlib.import_module(f"_faults_{arguments.campaign}").run(arguments.cases, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
