"""What the guards of a step cost on two gloo ranks: the agreement before each update, the watch's beat, and the comparison of replicas.

    python benchmarks/step_guard.py [--rounds 300]

The network is that of train_step.py (10.5 million parameters, fp32). Medians over the rounds, on rank 0. "agreement" is one all-reduce of
seven numbers with the look for RUN/SAVE and RUN/STOP; "verdict" is all of Guard.verdict with a full window of losses, the agreement included.
"""

import argparse
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch.multiprocessing as mp
from train_step import SIZES


def run_of(folder: str):
    from engine.config import validate

    return validate({
        "run": {"dir": folder, "device": "cpu"},
        "model": {"family": "llama", "num_layers": SIZES["layers"], "hidden_size": SIZES["hidden"], "ffn_hidden_size": SIZES["ffn"],
                  "num_attention_heads": SIZES["heads"], "vocab_size": SIZES["vocab"]},
        "data": {"train": ["unused"]},
        "train": {"seq_len": SIZES["seq"], "global_batch": 2, "steps": 1, "precision": "fp32"},
    })


def median(act, rounds: int) -> float:
    """Microseconds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def measure(rank: int, folder: str, rounds: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    from engine.faults import Guard, Switches
    from engine.mcore import replicas, topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role
    from engine.stages import build_stage
    from engine.watch import Watch

    torch.set_num_threads(1)
    run = run_of(folder)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    place = topology.start(run)
    model = ParallelModel(run, place, build_stage("pretrain"), "policy", Role())
    switches = Switches(run)
    guard, watch = Guard(run.faults, switches, print), Watch(900, None, place, None)
    for i in range(run.faults.spike_window):
        guard.spikes.add(3 + i / 100)
    result = SimpleNamespace(loss=3.3)
    found = {
        "agreement": median(lambda: switches.agree([0, 0, 0]), rounds),
        "verdict": median(lambda: guard.verdict("policy", model, result, 1.0, None, is_first=True), rounds),
        "beat of the watch": median(watch.beat, rounds),
        "comparison of replicas": median(lambda: replicas.mismatches(model), max(3, rounds // 50)),
    }
    if rank == 0:
        for name, microseconds in found.items():
            print(f"{name:24} {microseconds:10.1f} us")
    topology.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, args.rounds), nprocs=2)


if __name__ == "__main__":
    main()
