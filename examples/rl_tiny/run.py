"""GRPO and PPO from the SFT model of examples/align_tiny, on two CPU ranks, with held-out accuracy before and after as table and plot.

    python examples/rl_tiny/run.py [--seeds 1 2 3] [--stages grpo ppo]

Every step is a command of launch/ or of the examples, printed before it runs; finished steps are not repeated (remove work/ to start anew).
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT, WORK = HERE.parents[1], HERE / "work"
SFT = HERE.parent / "align_tiny/work/sft"
sys.path.insert(0, str(ROOT))


def call(*command: str) -> None:
    print("==", " ".join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def train(stage: str, seed: int) -> Path:
    """The run's folder; training goes on where it stopped."""
    folder = WORK / f"{stage}_{seed}"
    if not (folder / "done").is_file():
        call("-m", "torch.distributed.run", "--nproc-per-node", "2", "launch/align.py", f"examples/rl_tiny/{stage}.yaml", f"run.dir={folder}",
             f"run.seed={seed}")
        (folder / "done").touch()
    return folder


def plot(curves: dict[tuple[str, int], list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (accuracy, divergence) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {stage: f"C{k}" for k, stage in enumerate(dict.fromkeys(stage for stage, _ in curves))}
    for (stage, seed), (held, steps) in curves.items():
        accuracy.plot([line["step"] for line in held], [100 * line["reward/exact"] for line in held], colours[stage], label=f"{stage}, seed {seed}")
        divergence.plot([line["step"] for line in steps], [line["kl/reference"] for line in steps], colours[stage])
    accuracy.set(xlabel="step", ylabel="held-out exact match, %")
    # k3 weighs a token that has become improbable by the inverse of its probability, so single steps stand out by magnitudes.
    divergence.set(xlabel="step", ylabel="KL from the SFT model (k3), nats per token", yscale="log")
    accuracy.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    from engine.log import read_metrics

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--stages", nargs="+", default=["grpo", "ppo"], choices=["grpo", "ppo"])
    args = parser.parse_args()
    if not (SFT / "checkpoints").is_dir():
        call("examples/align_tiny/run.py", "--until", "sft")
    if not (WORK / "data/held.jsonl").is_file():
        call("examples/rl_tiny/prompts.py", "--data-dir", str(SFT.parent / "data"), "--output-dir", str(WORK / "data"))
    rows, curves = [], {}
    for stage in args.stages:
        for seed in args.seeds:
            folder = train(stage, seed)
            held, steps = read_metrics(folder, "held_out"), [line for line in read_metrics(folder) if line.get("kl/reference") is not None]
            curves[stage, seed] = held, steps
            before, after = (100 * line["reward/exact"] for line in (held[0], held[-1]))
            seconds = sum(line["step_time_s"] for line in read_metrics(folder))
            rows.append(f"| {stage} | {seed} | {before:.1f}% | {after:.1f}% | {after - before:+.1f} | {steps[-1]['kl/reference']:.3f} | {seconds / 60:.1f} |")
    table = "\n".join(["| stage | seed | before | after | points | KL, nats per token | minutes |", "| --- | --- | --- | --- | --- | --- | --- |", *rows])
    (WORK / "table.md").write_text(table + "\n")
    plot(curves, WORK / "curves.png")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
