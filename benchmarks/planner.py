"""The planner beside the truth: beside published runs, or beside a run of one configuration on this machine.

    python benchmarks/planner.py published                                           # the table of docs/planner.md
    torchrun --nproc-per-node N benchmarks/planner.py run CONFIG.yaml [key=value ...]    # peak memory and step time on N GPUs, or memory on N CPU ranks

`run` trains a few steps on random tokens in the configuration's own layout and prints measured / predicted. On a GPU: what torch allocated at
its most against all the planner counts but CUDA and fragmentation, what the device had in use against the whole, and the median step. On CPU ranks:
parameters, gradients and optimizer state, and what autograd saves of one micro-batch; there is no speed to compare there.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import _planner_published as published_runs  # noqa: E402

GIB = 2**30


def published() -> None:
    print("| run | GPUs | published | predicted | ratio | GiB | recomputation that fits here | the same with bf16 gradients and moments |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in published_runs.ROWS:
        plan = published_runs.planned(row)
        said = plan.tflops if row.unit == "TFLOP/s" else plan.tokens_per_gpu
        needs = [published_runs.least_recomputation(row, precision_aware) for precision_aware in (False, True)]
        print(f"| {row.name}{' (fitted)' * row.is_fitted} | {row.gpus} | {row.rate:.4g} {row.unit} | {said:.4g} | {said / row.rate:.2f} | "
              f"{plan.memory.total / GIB:.1f} | {needs[0]} | {needs[1]} |")


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
    from engine.planner.cluster import make_cluster
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
    spent = step_time(run, make_cluster(gpu, world_size), backend).total
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
    parser.add_argument("what", choices=("published", "run"))
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="h100", help="kind of this machine's GPUs (engine/planner/cluster.py)")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_intermixed_args()
    if args.what == "published":
        published()
    elif args.config:
        compare(args.config, args.overrides, args.gpu, args.steps)
    else:
        parser.error("run needs a configuration")


if __name__ == "__main__":
    main()
