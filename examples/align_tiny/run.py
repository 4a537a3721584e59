"""From a base model through SFT, a reward model and DPO, on two CPU ranks, with a table of held-out measures.

    python examples/align_tiny/run.py [--until sft]

Every step is a command of launch/ or data_tools/, printed before it runs; finished steps are not repeated (remove work/ to start anew).
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT, WORK = HERE.parents[1], HERE / "work"
STAGES = ("sft", "reward", "dpo")
sys.path.insert(0, str(ROOT))


def call(*command: str) -> None:
    print("==", " ".join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def launch(script: str, config: str, *overrides: str) -> None:
    call("-m", "torch.distributed.run", "--nproc-per-node", "2", f"launch/{script}.py", f"examples/align_tiny/{config}.yaml", *overrides)


def measure(model: str, config: str) -> dict:
    """The held-out measures of the stage of `config`, taken of another stage's checkpoint without training it."""
    from engine.log import read_metrics

    folder = WORK / f"measured/{model}_{config}"
    if not (folder / "metrics.jsonl").is_file():
        launch("align", config, f"checkpoint.load={WORK / model}", f"run.dir={folder}", "train.steps=0")
    return read_metrics(folder, "held_out")[-1]


def main() -> int:
    from engine.log import read_metrics

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to train; the table needs all")
    until = parser.parse_args().until
    data = WORK / "data"
    if not (data / "pairs_held.jsonl").is_file():
        call("examples/align_tiny/tasks.py", "--output-dir", str(data))
    if not (data / "text_text_document.idx").is_file():
        call("data_tools/preprocess.py", "--input", str(data / "text.jsonl"), "--output-prefix", str(data / "text"), "--tokenizer", "bytes", "--append-eod")
    launch("pretrain", "pretrain")
    for stage in STAGES[:STAGES.index(until) + 1]:
        launch("align", stage)
    if until != STAGES[-1]:
        return 0

    rows = []
    for model in ("base", "sft", "dpo"):
        chat, pairs = measure(model, "sft"), measure(model, "dpo")
        rows.append(f"| {model} | {chat['valid_loss']:.3f} | {chat['exact_match']:.1%} | {pairs['logps/accuracy']:.1%} | |")
    before, *_, after = read_metrics(WORK / "reward", "held_out")
    rows.insert(2, f"| reward (before training {before['accuracy']:.1%}) | | | | {after['accuracy']:.1%} |")
    table = "\n".join(["| after | validation loss of answers | exact match | preference accuracy | reward accuracy |", "| --- | --- | --- | --- | --- |", *rows])
    (WORK / "table.md").write_text(table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
