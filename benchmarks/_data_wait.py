"""How long the loop waits for data: the quickstart's model and layout on two CPU ranks, over a corpus of random tokens.

The peer is the same run with data.prefetch=0, where every batch is read when it is needed. Its seconds and ours are what the loop has waited,
per step, `data_wait_s` of metrics.jsonl, summed over all steps, the first included; the ratio is our wait over our whole steps. Beside it stands
the same with data.read_on=first_rank, where one of the two ranks reads for both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from _data_rows import Row

ROOT = Path(__file__).parents[1]
WAYS = {"prefetch=0": {"prefetch": 0}, "ahead": {}, "first_rank": {"read_on": "first_rank"}}


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    steps = 4 if quick else 20
    with tempfile.TemporaryDirectory(prefix="trireme-wait-") as folder:
        corpus = _corpus(Path(folder) / "corpus")
        found = {name: [] for name in WAYS}
        for i in range(1 if quick else min(rounds, 3)):      # a round takes seconds
            for name, data in WAYS.items():
                found[name] += _steps(Path(folder) / f"{name}-{i}", corpus, data, steps)
    wait = {name: sum(line["data_wait_s"] for line in lines) / len(lines) for name, lines in found.items()}
    step = {name: sum(line["step_time_s"] for line in lines) / len(lines) for name, lines in found.items()}
    share = {name: f"{100 * wait[name] / step[name]:.3f}%" for name in WAYS}
    median = statistics.median(line["step_time_s"] for line in found["ahead"])
    for name in ("ahead", "first_rank"):
        yield Row(f"wait per step, quickstart, 2 ranks, {name}", "prefetch=0", wait["prefetch=0"], wait[name], None, None,
                  f"{share[name]} of a step", "< 1%", f"prefetch=0: {share['prefetch=0']}; median step {1000 * median:.0f} ms, {len(found[name])} steps")


def _corpus(prefix: Path) -> str:
    from engine.data.indexed import IndexedWriter

    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in random.integers(50, 2000, size=1000):
            writer.add_document(random.integers(0, 6144, size=length))
    return str(prefix)


def _steps(run_dir: Path, corpus: str, data: dict, steps: int) -> list[dict]:
    """The training lines of one run under torchrun."""
    raw = yaml.safe_load((ROOT / "examples/quickstart/pretrain.yaml").read_text())
    raw["run"]["dir"] = str(run_dir)
    raw["data"] = {"train": [corpus], **data}
    raw["train"] |= {"steps": steps, "eval_every": 0, "eval_samples": 0}
    raw["schedule"]["warmup_steps"] = 0
    raw["checkpoint"] = {"save_at_end": False}
    raw["log"] = {"tensorboard": False, "every": steps}
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", str(ROOT / "launch/pretrain.py"), str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
