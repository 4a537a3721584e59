"""Does annealing beat the same tokens at a constant rate, and does an average beat the last weights?

    make quickstart                              # its corpus and tokenizer
    python examples/anneal/compare.py

One trunk at a constant learning rate, then branches of the same steps on the same samples: constant, annealed to 0, and annealed to a fifth of
the rate, each with an average of its weights. Runs that are done are not repeated. Prints the validation losses and writes them to work/table.md.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
NUM_RANKS = 2
# name: (configuration, overrides)
BRANCHES = {
    "constant": ("constant", []),
    "annealed to 0": ("anneal", []),
    "annealed to a fifth": ("anneal", ["schedule.min_lr=4.0e-4", "run.dir=examples/anneal/work/fifth"]),
}
FOLDERS = {"constant": "constant", "annealed to 0": "anneal", "annealed to a fifth": "fifth"}


def run(name: str, *overrides: str) -> None:
    """One branch on two data-parallel CPU ranks; a run that is finished returns at once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS), "launch/pretrain.py", f"examples/anneal/{name}.yaml", *overrides]
    print("==", " ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> int:
    from engine.log import read_metrics

    if not (ROOT / "examples/quickstart/work/data/train_text_document.idx").is_file():
        print("the quickstart's corpus is missing; run `make quickstart` first", file=sys.stderr)
        return 1
    run("base")
    rows = []
    for name, (config, overrides) in BRANCHES.items():
        run(config, *overrides)
        folder = HERE / "work" / FOLDERS[name]
        last, mean = (read_metrics(folder, split)[-1]["valid_loss"] for split in ("held_out", "held_out/average"))
        rows.append(f"| {name} | {read_metrics(folder, 'held_out')[0]['valid_loss']:.4f} | {last:.4f} | {mean:.4f} |")
    table = "\n".join(["| branch | at its start | last weights | their average |", "| --- | --- | --- | --- |", *rows])
    (HERE / "work" / "table.md").write_text(table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
