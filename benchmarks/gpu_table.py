"""The speed table of one GPU: each row is a piece of work, done by the engine and by its peers in the same run, with the ratio and the goal.

    python benchmarks/gpu_table.py [--only gpt_1.7b,loss] [--rounds 2] [--steps 5] [--output FILE.md]
    python benchmarks/gpu_table.py --tiny              # every row's code at toy sizes on a CPU: shows that it runs, says nothing of speed

A contestant lives in a process of its own (_gpu_work.py) and has the GPU to itself; the contestants of a row go round by round, so that a warm GPU is
everybody's, and the median over all steps counts. FLOPs by Megatron's formula (engine/metrics.py), the same for all contestants of a row. A step of a
training row is several micro-batches and one update, as in published runs. A library that is missing is named in its cell, and beside each goal stands
whether it was met. Exit codes: 0, 1 if a contestant failed or there is no GPU, 2 usage; a goal that is missed is told, no failure. Left out: several GPUs.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = dict(hidden=64, layers=2, heads=4, ffn=96, vocab=256, seq=64, batch=2)
LLAMA_1B = dict(hidden=2048, layers=16, heads=32, groups=8, ffn=8192, vocab=128256, tied=True)
LLAMA_3B = dict(hidden=3072, layers=28, heads=24, groups=8, ffn=8192, vocab=128256, tied=True)
BF16 = {}
FAILED = "exit code"
TIMEOUT = 600  # seconds of one contestant in one round, compiling included
FEED = "less than 1% of the time"


@dataclass(frozen=True)
class Goal:
    """Of the first contestant. speed: label of another -> how many times as fast as it, at least; memory: of its memory, at most; note: the source."""

    speed: dict[str, float] = field(default_factory=dict)
    tflops: float = 0
    memory: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        parts = [f"at least {self.tflops:g} TFLOP/s"] * bool(self.tflops) + [f"at least {least:.2f}x {label}" for label, least in self.speed.items()]
        parts += [f"at most {most:.2f}x the memory of {label}" for label, most in self.memory.items()]
        return " ".join(filter(None, ["; ".join(parts), f"({self.note})" if self.note else ""]))

    def verdict(self, seconds: dict[str, float], flops: float, gib: dict[str, float]) -> str:
        """Of medians by label, the first contestant's first; its FLOPs. "" where there is no goal."""
        own = next(iter(seconds))
        missed = [f"{flops / seconds[own] / 1e12:.1f} TFLOP/s"] * (flops / seconds[own] / 1e12 < self.tflops)
        missed += [f"{seconds[label] / seconds[own]:.2f}x {label}" for label, least in self.speed.items()
                   if label in seconds and seconds[label] / seconds[own] < least]
        missed += [f"{gib[own] / gib[label]:.2f}x the memory of {label}" for label, most in self.memory.items()
                   if label in gib and gib[own] > most * gib[label]]
        unknown = [label for label in {**self.speed, **self.memory} if label not in seconds]
        if missed:
            return "**missed**: " + ", ".join(missed)
        if unknown:
            return f"open: no figure of {', '.join(unknown)}"
        return "**met**" if self.tflops or self.speed or self.memory else ""


@dataclass(frozen=True)
class Row:
    """contestants: label -> (function of _gpu_work.py, its options). The first is ours. of: what is told beside milliseconds, "tflops" or "memory".
    tiny: sizes that --tiny takes instead."""

    name: str
    sizes: dict
    contestants: dict
    goal: Goal
    of: str = "tflops"
    tiny: dict = field(default_factory=dict)


def training(name: str, sizes: dict, contestants: dict, goal: Goal) -> Row:
    return Row(name, sizes, contestants, goal, tiny={**TINY, "gated": sizes.get("gated", True), "micro_batches": min(sizes["micro_batches"], 2)})


def recipes() -> dict:
    found = {f"ours, {recipe}": ("ours", {"train": {"fp8": {"recipe": recipe, **more}}})
             for recipe, more in (("tensorwise", {}), ("delayed", {}), ("blockwise", {"format": "e4m3"}))}
    found |= {f"megatron-core, te's {recipe}": ("megatron", {"fp8": recipe}) for recipe in ("tensorwise", "delayed")}
    return {**found, "ours, bf16": ("ours", BF16), "torchtitan, its float8": ("torchtitan", {"fp8": True}),
            "compiled torch, torchao's float8, tensorwise": ("torchao_llama", {}), "torchtitan, bf16": ("torchtitan", {})}


def beside_torchtitan(label: str, ours: dict, theirs: dict) -> dict:
    """torchtitan twice: as it comes, with FlexAttention, and with torch's attention, whose kernels for a causal mask may be faster."""
    return {label: ("ours", ours), "torchtitan": ("torchtitan", theirs), "torchtitan, SDPA": ("torchtitan", {"attention": "sdpa", **theirs})}


TITAN = {"torchtitan": 1.05, "torchtitan, SDPA": 1.05}
FOUNDRY = "llm-foundry's benchmarks, sequences of 2,048: 413.8 for 1B on 8 H100, 432.7 for 3B on 16"
MOE = dict(hidden=2048, ffn=1024, heads=16, vocab=1024, seq=4096, batch=2, layers=1)
ROWS = [
    Row("gemm", dict(hidden=8192), {"bf16": ("gemm", {}), "fp8": ("gemm", {"fp8": True})}, Goal(note="what the machine can do"), tiny=dict(hidden=64)),
    training("gpt_1.7b", dict(hidden=2048, layers=24, heads=16, ffn=8192, vocab=131072, seq=4096, batch=2, micro_batches=8, gated=False),
             {"ours": ("ours", BF16), "megatron-core": ("megatron", {})},
             Goal({"megatron-core": 1.0}, 409, note="Megatron-LM's README: 408.8 for its 1.7B on 48 H100; aim 450")),
    training("llama_1b_2048", {**LLAMA_1B, "seq": 2048, "batch": 8, "micro_batches": 4}, beside_torchtitan("ours", BF16, {}),
             Goal(TITAN, 413, note=FOUNDRY)),
    training("llama_1b_8192", {**LLAMA_1B, "seq": 8192, "batch": 1, "micro_batches": 8}, beside_torchtitan("ours", BF16, {}),
             Goal(TITAN, 413, note=FOUNDRY)),
    # 3.2 billion parameters at 18 bytes and their activations would be too much for 80 GB; with moments and gradients in bf16 they are 12;
    # torchtitan too can keep its moments in bf16.
    training("llama_3b_4096", {**LLAMA_3B, "seq": 4096, "batch": 1, "micro_batches": 8},
             beside_torchtitan("ours, moments in bf16", {"optim": {"precision_aware": True}}, {"low_moments": True}), Goal(TITAN, 432, note=FOUNDRY)),
    training("fp8_2048", dict(hidden=2048, layers=24, heads=16, ffn=8192, vocab=32768, seq=4096, batch=2, micro_batches=8), recipes(),
             Goal({"ours, bf16": 1.10})),
    training("fp8_4096", dict(hidden=4096, layers=8, heads=32, ffn=14336, vocab=32768, seq=4096, batch=2, micro_batches=8), recipes(),
             Goal({"ours, bf16": 1.20})),
    training("small", dict(hidden=1024, layers=24, heads=16, ffn=2816, vocab=32768, seq=1024, batch=1, micro_batches=1),
             {"ours, CUDA graphs": ("ours", {"train": {"cuda_graphs": True}}), "ours": ("ours", BF16)}, Goal({"ours": 1.2})),
    Row("loss", dict(hidden=4096, vocab=131072, seq=8192, batch=1),
        {"ours": ("our_loss", {}), "F.linear, F.cross_entropy": ("plain_loss", {}), "F.linear_cross_entropy, chunked": ("torchs_loss", {})},
        Goal({"F.linear, F.cross_entropy": 1 / 1.05}, memory={"F.linear, F.cross_entropy": 0.25}), "memory", tiny=TINY),
    *(Row(f"moe_{experts}", {**MOE, "experts": experts, "top_k": top_k},
          {"ours": ("our_moe", {}), "dense MLP of equal FLOPs": ("dense_mlp", {}), "loop over experts": ("torch_moe", {"grouped": False}),
           "torch._grouped_mm": ("torch_moe", {"grouped": True})},
          Goal({"dense MLP of equal FLOPs": 0.75}), tiny={**TINY, "experts": 4, "top_k": 2}) for experts, top_k in ((8, 2), (64, 8))),
    Row("generation", {**LLAMA_1B, "prompt": 128, "seq": 384, "batch": 64}, {"ours": ("our_generation", {}), "transformers": ("hf_generation", {})},
        Goal({"transformers": 3.0}), tiny={**TINY, "prompt": 8, "seq": 16}),
]


def measured(row: Row, arguments) -> dict[str, dict]:
    """label -> what its process said, its seconds those of all rounds."""
    sizes = {**(row.tiny if arguments.tiny else row.sizes), "device": arguments.device}
    found: dict[str, dict] = {}
    for _ in range(arguments.rounds):
        for label, (function, options) in row.contestants.items():
            asked = json.dumps({"sizes": sizes, "warm_up": arguments.warm_up, "steps": arguments.steps, **options})
            if "seconds" not in found.get(label, {"seconds": []}):
                continue
            answer = answered([sys.executable, str(ROOT / "benchmarks" / "_gpu_work.py"), function, asked])
            if "seconds" in answer and label in found:
                answer["seconds"] += found[label]["seconds"]
            found[label] = answer
    return found


def answered(command: list[str]) -> dict:
    """What a contestant's process said."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {TIMEOUT} s"}
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failed": f"{FAILED} {done.returncode}"}
    if "failed" in answer:
        print(done.stderr[-3000:], file=sys.stderr)
    return answer


def lines_of(row: Row, found: dict[str, dict]) -> list[str]:
    first = next(iter(row.contestants))
    seconds = {label: statistics.median(answer["seconds"]) for label, answer in found.items() if "seconds" in answer}
    gib = {label: found[label]["above_gib" if row.of == "memory" else "peak_gib"] for label in seconds}
    lines = []
    for label, answer in found.items():
        goal = str(row.goal) if label == first else ""
        if label not in seconds:
            lines.append(f"| {row.name} | {label} | {answer.get('missing') or answer.get('failed')} | | | | {goal} | |")
            continue
        tflops = f"{answer['flops'] / seconds[label] / 1e12:.1f}" if answer["flops"] else ""
        ratio = f"{seconds[label] / seconds[first]:.2f}" if first in seconds and label != first else ""
        verdict = row.goal.verdict(seconds, answer["flops"], gib) if label == first else ""
        lines.append(f"| {row.name} | {label} | {1000 * seconds[label]:.2f} | {tflops} | {gib[label]:.2f} | {ratio} | {goal} | {verdict} |")
    return lines


def waiting(arguments) -> list[str]:
    """The loader and the feed in a real run: the share of the time in which the loop waited for data."""
    import numpy as np

    from engine.config import dump_config
    from engine.data.indexed import IndexedWriter
    from engine.log import read_metrics

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _gpu_work import run_of

    sizes = {**(TINY if arguments.tiny else {**LLAMA_1B, "seq": 4096, "batch": 2}), "device": arguments.device}
    steps = 3 if arguments.tiny else 40
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(f"{folder}/text", np.int32) as writer:
            random = np.random.default_rng(0)
            for _ in range(200 if arguments.tiny else 20000):
                writer.add_document(random.integers(0, sizes["vocab"], random.integers(10, 4000)).astype(np.int32))
        run = run_of(sizes, run={"dir": f"{folder}/run"}, data={"train": [f"{folder}/text"]}, train={"steps": steps}, log={"tensorboard": False},
                     checkpoint={"save_at_end": False})
        (Path(folder) / "run.yaml").write_text(dump_config(run))
        done = subprocess.run([sys.executable, "launch/pretrain.py", f"{folder}/run.yaml"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return [f"| feed | ours | {FAILED} {done.returncode} | | | | {FEED} | |"]
        records = read_metrics(run.run.dir)[steps // 4:]
    share = sum(record["data_wait_s"] for record in records) / sum(record["step_time_s"] for record in records)
    milliseconds = 1000 * statistics.median(record["step_time_s"] for record in records)
    verdict = "" if arguments.tiny else "**met**" if share < 0.01 else f"**missed**: {100 * share:.2f}%"
    return [f"| feed | ours, waiting for data {100 * share:.2f}% of the time | {milliseconds:.2f} | | | | {FEED} | {verdict} |"]


def main() -> int:
    names = [row.name for row in ROWS] + ["feed"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows, comma-separated: " + ", ".join(names))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of each round")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU, one round of one step")
    parser.add_argument("--output", metavar="FILE.md")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    arguments.device = "cpu" if arguments.tiny else "cuda"
    if arguments.tiny:
        arguments.rounds = arguments.steps = arguments.warm_up = 1
    sys.path.insert(0, str(ROOT))
    if not (where := machine(arguments.device)):
        print(f"torch of {sys.executable} sees no GPU; --tiny shows on a CPU that the rows run", file=sys.stderr)
        return 1
    lines = [f"{datetime.date.today()}, {where}", "",
             "| work | contestant | ms | TFLOP/s | GiB | its time / the first's | goal | |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    failed, missing = [], []
    for row in (replace(row, goal=Goal()) for row in ROWS) if arguments.tiny else ROWS:
        if row.name in wanted:
            found = measured(row, arguments)
            failed += [f"{row.name}: {label}" for label, answer in found.items() if "failed" in answer]
            missing += [f"{row.name}: {label}" for label, answer in found.items() if "missing" in answer]
            fresh = lines_of(row, found)
            print("\n".join(fresh), flush=True)
            lines += fresh
    if "feed" in wanted:
        lines += (fresh := waiting(arguments))
        failed += ["feed"] * (FAILED in fresh[0])
        print("\n".join(fresh), flush=True)
    if missing:
        print("not there: " + "; ".join(missing), file=sys.stderr)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")
    if failed:
        print("failed: " + "; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def machine(device: str) -> str:
    """What it was measured on; asked of a process of its own, which then holds no memory of the GPU. Empty where torch sees no GPU that is wanted."""
    code = ("import torch; c = torch.cuda; print(f'{c.get_device_name()}, ' if c.is_available() else '', "
            "f'torch {torch.__version__}, CUDA {torch.version.cuda}', sep='')")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    return "" if device == "cuda" and (not said or said.startswith("torch ")) else f"{device}: {said}"


if __name__ == "__main__":
    sys.exit(main())
