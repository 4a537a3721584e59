"""The planner beside the truth: beside published runs, or beside a run of one configuration on this machine.

    python benchmarks/planner.py published                                           # the table of docs/planner.md
    python benchmarks/planner.py several [--tiny]                                    # one GPU: several models, one after the other
    torchrun --nproc-per-node N benchmarks/planner.py run CONFIG.yaml [key=value ...]    # peak memory and step time on N GPUs, or memory on N CPU ranks

`several` does `run` with each of SEVERAL in a process of its own; --tiny: at toy sizes on a CPU rank, which shows that it runs. Exit code 1 if one fails.
`run` trains a few steps on random tokens in the configuration's own layout and prints measured / predicted. On a GPU: what torch allocated at
its most against all the planner counts but CUDA and fragmentation, what the device had in use against the whole, and the median step. On CPU ranks:
parameters, gradients and optimizer state, and what autograd saves of one micro-batch; there is no speed to compare there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import _planner_published as published_runs  # noqa: E402

GIB = 2**30
LLAMA = dict(family="llama", size="llama3_8b", num_layers=8)
MIXTURE = dict(family="mixtral", num_layers=4, hidden_size=2048, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8, vocab_size=32000,
               moe=dict(num_experts=8, top_k=2))
SEVERAL = {      # what fits on one GPU of 80 GB: (model, train)
    "8 layers of Llama 3 8B": (LLAMA, dict(seq_len=4096)),
    "the same, micro-batch 2, selective": (LLAMA, dict(seq_len=4096, micro_batch=2, recompute="selective")),
    "the same at 8,192, full": (LLAMA, dict(seq_len=8192, recompute="full")),
    "the same, torch layers": (LLAMA, dict(seq_len=2048, micro_batch=2, backend="torch")),
    "the same, FP8": (LLAMA, dict(seq_len=4096, fp8=dict(recipe="tensorwise"))),
    "4 layers and one for further tokens": ({**LLAMA, "num_layers": 4, "mtp": dict(num_layers=1)}, dict(seq_len=4096)),
    "mixture of 8 experts": (MIXTURE, dict(seq_len=4096, micro_batch=2)),
}
TINY = dict(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=251)


def published() -> None:
    print("| run | GPUs | published | predicted | ratio | GiB | recomputation that fits here | the same with bf16 gradients and moments |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in published_runs.ROWS:
        plan = published_runs.planned(row)
        said = plan.tflops if row.unit == "TFLOP/s" else plan.tokens_per_gpu
        needs = [published_runs.least_recomputation(row, precision_aware) for precision_aware in (False, True)]
        print(f"| {row.name}{' (fitted)' * row.is_fitted} | {row.gpus} | {row.rate:.4g} {row.unit} | {said:.4g} | {said / row.rate:.2f} | "
              f"{plan.memory.total / GIB:.1f} | {needs[0]} | {needs[1]} |")


def several(gpu: str, steps: int, is_tiny: bool) -> int:
    """How many failed."""
    failed = []
    for name, (model, train) in SEVERAL.items():
        raw = {"run": {"dir": "unused", "device": "cuda"}, "model": model, "data": {"train": ["unused"]},
               "train": {"global_batch": 4, "steps": 1, "precision": "bf16", **train}}
        if is_tiny:
            raw["run"]["device"], raw["model"] = "cpu", {**model, **TINY}
            raw["train"] = {**raw["train"], "seq_len": 64, "precision": "fp32", "fp8": {"recipe": "none"}}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            json.dump(raw, file)      # which YAML contains
            file.flush()
            print(f"{name}:", flush=True)
            command = [sys.executable, __file__, "run", file.name, "--steps", str(steps), *(("--gpu", gpu) if gpu else ())]
            failed += [name] * (subprocess.run(command).returncode != 0)
    if failed:
        print("failed: " + "; ".join(failed), file=sys.stderr)
    return len(failed)


def compare(path: str, overrides: list[str], gpu: str, steps: int) -> None:
    import torch
    from engine.config import load_config
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stages import build_stage

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    run = load_config(path, overrides, world_size)
    place = topology.start(run)
    network = ParallelModel(run, place, build_stage("pretrain"), "policy")
    rows = _on_cpu(network, run, place, world_size) if place.device == "cpu" else _on_gpu(network, run, place, world_size, gpu, steps)
    if place.rank == 0:
        print(f"{place}, {torch.cuda.get_device_name() if place.device == 'cuda' else 'CPU ranks'}; of rank 0")
        for name, measured, said, unit in rows:
            print(f"  {name:32} measured {measured:10.4f} {unit:5} planned {said:10.4f} {unit:5} measured / planned {measured / said:.3f}")
    topology.stop()


def _on_cpu(network, run, place, world_size: int):
    import planner_probe
    from engine.planner.activations import Saved
    from engine.planner.weights import chunks, weights

    parameters, gradients, optimizer, places = planner_probe.kept_by(network, place)
    said, model = weights(run, world_size, *places), Saved(run, "torch", "cpu")
    saved = sum(size for size, _ in planner_probe.saved_by(network, run, place))
    pairs = [("parameters", parameters, said.parameters), ("gradients", gradients, said.gradients), ("optimizer", optimizer, said.optimizer),
             ("activations of a micro-batch", saved, sum(map(model.chunk, chunks(run)[place.pp_rank])))]
    return [(name, a / GIB, b / GIB, "GiB") for name, a, b in pairs]


def _on_gpu(network, run, place, world_size: int, gpu: str, steps: int):
    import torch
    from engine.planner.cluster import kind_of, make_cluster
    from engine.planner.memory import memory_of, micro_batches
    from engine.planner.search import backend_of
    from engine.planner.time import step_time

    backend = backend_of(run) if network.on_te else "torch"
    own = [_random_batch(run, place, i) for i in range(micro_batches(run, world_size))]
    seconds = []
    for number in range(1, steps + 4):      # the first three warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        network.forward_backward(own)
        network.step(lr=1e-5, number=number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    needs = memory_of(run, world_size, backend)[0]
    free, total = torch.cuda.mem_get_info()
    spent = step_time(run, make_cluster(gpu or kind_of(torch.cuda.get_device_name()), world_size), backend).total
    return [("allocated by torch at its most", torch.cuda.max_memory_allocated() / GIB, (needs.total - needs.runtime - needs.margin) / GIB, "GiB"),
            ("in use on the device", (total - free) / GIB, needs.total / GIB, "GiB"),
            ("step", statistics.median(seconds[3:]), spent, "s")]


def _random_batch(run, place, number: int) -> dict:
    import torch

    size, seq_len = run.train.micro_batch, run.train.seq_len
    text = torch.randint(0, run.model.vocab_size, (size, seq_len + 1), generator=torch.Generator().manual_seed(1000 * place.dp_rank + number))
    return dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(size, seq_len), position_ids=torch.arange(seq_len).expand(size, seq_len))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "several", "run"))
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--gpu", default="", help="kind of this machine's GPUs (engine/planner/cluster.py), where their name does not say it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="several: toy sizes on a CPU rank")
    args = parser.parse_intermixed_args()
    if args.what == "published":
        published()
    elif args.what == "several":
        sys.exit(1 if several(args.gpu, args.steps, args.tiny) else 0)
    elif args.config:
        compare(args.config, args.overrides, args.gpu, args.steps)
    else:
        parser.error("run needs a configuration")


if __name__ == "__main__":
    main()
