"""The planner beside the truth: beside published runs, or beside a run of one configuration on this machine.

    python benchmarks/planner.py published                                           # the table of docs/planner.md
    python benchmarks/planner.py several [--tiny] [--gpu KIND]                       # one GPU: several models, one after the other
    torchrun --nproc-per-node N benchmarks/planner.py run CONFIG.yaml [key=value ...]    # peak memory and step time on N GPUs, or memory on N CPU ranks

`several` does `run` with each of SEVERAL in a process of its own; --tiny: at toy sizes on a CPU rank, which shows that it runs.
`run` trains a few steps on random tokens in the configuration's own layout and prints measured / predicted, within or outside the goal. On a GPU:
what torch allocated at its most against all the planner counts but CUDA and fragmentation, what the device had in use against the whole (goal:
within 10%), and the median step (20%). On CPU ranks, where there is no speed to compare: parameters, gradients and optimizer state of rank 0 (to the
byte), and what autograd saves of one micro-batch, summed over the ranks (0.2%), as tests/test_planner.py demands.

Exit codes: 0 all ran, and each fitted or ran out of memory as planned, whether or not within the goals, which the lines say; 1 one failed to run,
or the planner was wrong about whether it fits; 2 usage, or a GPU that the planner does not know, which is told before anything runs.
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
GOALS = {"GiB": 0.10, "s": 0.20}      # of memory and of a step, on a GPU
CPU_GOALS = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0, "activations of a micro-batch": 0.002}
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
    print("| run | GPUs | published | predicted | ratio | GiB | recomputation that fits here | the same, lean |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in published_runs.ROWS:
        plan = published_runs.planned(row)
        said = plan.tflops if row.unit == "TFLOP/s" else plan.tokens_per_gpu
        needs = [published_runs.least_recomputation(row, is_lean) for is_lean in (False, True)]
        print(f"| {row.name}{' (fitted)' * row.is_fitted} | {row.gpus} | {figure(row.rate)} {row.unit} | {figure(said)} | {said / row.rate:.2f} | "
              f"{plan.memory.total / GIB:.1f} | {needs[0]} | {needs[1]} |")


def figure(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 1000 else f"{rate:.4g}"


def several(gpu: str, steps: int, is_tiny: bool) -> int:
    """Exit code."""
    within, failed = 0, []
    for name, (model, train) in SEVERAL.items():
        raw = {"run": {"dir": "unused", "device": "cuda"}, "model": model, "data": {"train": ["unused"]},
               "train": {"global_batch": 4, "steps": 1, "precision": "bf16", **train}}
        if is_tiny:
            raw["run"]["device"], raw["model"] = "cpu", {**model, **TINY}
            raw["train"] = {**raw["train"], "seq_len": 64, "precision": "fp32", "fp8": {"recipe": "none"}}
        with tempfile.TemporaryDirectory() as folder:
            config, found = Path(folder, "run.yaml"), Path(folder, "found.json")
            config.write_text(json.dumps(raw))      # which YAML contains
            print(f"{name}:", flush=True)
            command = [sys.executable, __file__, "run", str(config), "--steps", str(steps), "--found", str(found), *(("--gpu", gpu) if gpu else ())]
            code = subprocess.run(command).returncode
            within += found.exists() and json.loads(found.read_text())["is_within"]
        failed += [name] * (code != 0)
    if failed:
        print("failed, or wrong about whether it fits: " + "; ".join(failed), file=sys.stderr)
    print(f"{within} of {len(SEVERAL)} within")
    return 1 if failed else 0


def kind_of_gpu(gpu: str) -> str:
    """The planner's name of this machine's GPU. gpu: --gpu, which says it where the device's own name does not. Raises ConfigError, in one line."""
    from engine.config import ConfigError
    from engine.planner.cluster import GPUS, kind_of, make_cluster

    if gpu:
        try:
            make_cluster(gpu, 1)
        except ConfigError:
            raise ConfigError([f"--gpu {gpu} is no GPU known here; there are {', '.join(GPUS)}"]) from None
        return gpu
    # In a process of its own, which then holds no memory of the GPU.
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    if not (name := subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()):
        raise ConfigError([f"torch of {sys.executable} sees no GPU; --tiny shows on a CPU rank that it runs"])
    return kind_of(name)


def judged(rows, is_cpu: bool):
    """rows: (name, measured, planned, unit). Of each the line that tells it, and whether it is within its goal."""
    for name, measured, said, unit in rows:
        goal = CPU_GOALS[name] if is_cpu else GOALS[unit]
        is_within = abs(measured - said) <= goal * said
        words = f"{'within' if is_within else 'outside'} {goal:.1%}" if goal else "equal" if is_within else "not equal"
        line = f"  {name:32} measured {measured:10.4f} {unit:5} planned {said:10.4f} {unit:5} measured / planned {measured / said:.3f}  {words}"
        yield line, is_within


def verdict(is_within: bool, planned_to_fit: bool, fitted: bool) -> tuple[str, bool, int]:
    """(what to print, is it within all goals, exit code)."""
    words = {True: "fits", False: "does not fit"}
    if planned_to_fit != fitted:
        return f"  planned: {words[planned_to_fit]}; the truth: {words[fitted]}", False, 1
    return f"  {words[fitted]}, as planned: {'within' if is_within else 'outside'}", is_within, 0


def compare(path: str, overrides: list[str], gpu: str, steps: int, found: str) -> int:
    """Exit code. found: a file for what `several` asks, {"is_within"}."""
    import torch
    from engine.config import load_config
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel      # before build, which it prepares megatron for
    from engine.mcore import build
    from engine.planner.cluster import kind_of, make_cluster
    from engine.planner.search import judge
    from engine.stages import build_stage

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    run = load_config(path, overrides, world_size)
    place = topology.start(run)
    is_cpu, rows, planned_to_fit, fitted = place.device == "cpu", [], True, True
    try:
        backend = build.backend_of(run, place.device)
    except ValueError as error:
        print(f"  not run: {error}")
        return 1
    if not is_cpu:
        kind, room = gpu or kind_of(torch.cuda.get_device_name()), torch.cuda.mem_get_info()[1] / GIB
        cluster = make_cluster(kind, world_size, memory_gib=room)
        planned_to_fit = judge(run, cluster, backend).fits
    try:
        network = ParallelModel(run, place, build_stage("pretrain"), "policy")
        rows = _on_cpu(network, run, place, world_size) if is_cpu else _on_gpu(network, run, place, cluster, backend, steps)
    except torch.cuda.OutOfMemoryError as error:
        if world_size > 1:
            raise      # the other ranks wait for this one
        fitted = False
        print(f"  {str(error).splitlines()[0]}")
    lines = list(judged(rows, is_cpu))
    said, is_within, code = verdict(all(good for _, good in lines), planned_to_fit, fitted)
    if place.rank == 0:
        print(f"{place}, {torch.cuda.get_device_name() if not is_cpu else 'CPU ranks'}; of rank 0")
        print("\n".join([line for line, _ in lines] + [said]))
        if found:
            Path(found).write_text(json.dumps({"is_within": is_within}))
    topology.stop()
    return code


def _on_cpu(network, run, place, world_size: int):
    import planner_probe
    import torch
    from engine.planner.activations import Saved
    from engine.planner.weights import chunks, weights

    parameters, gradients, optimizer, places = planner_probe.kept_by(network, place)
    said, model = weights(run, world_size, *places), Saved(run, "torch", "cpu")
    # Over all ranks, for experts are not evenly busy.
    saved = torch.tensor([sum(size for size, _ in planner_probe.saved_by(network, run, place)), sum(map(model.chunk, chunks(run)[place.pp_rank]))])
    torch.distributed.all_reduce(saved)
    pairs = [("parameters", parameters, said.parameters), ("gradients", gradients, said.gradients), ("optimizer", optimizer, said.optimizer),
             ("activations of a micro-batch", *saved.tolist())]
    return [(name, a / GIB, b / GIB, "GiB") for name, a, b in pairs]


def _on_gpu(network, run, place, cluster, backend: str, steps: int):
    import torch
    from engine.planner.memory import memory_of, micro_batches
    from engine.planner.time import step_time

    own = [_random_batch(run, place, i) for i in range(micro_batches(run, cluster.num_gpus))]
    seconds = []
    for number in range(1, steps + 4):      # the first three warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        network.forward_backward(own)
        network.step(lr=1e-5, number=number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    needs = memory_of(run, cluster.num_gpus, backend)[0]
    free, total = torch.cuda.mem_get_info()
    return [("allocated by torch at its most", torch.cuda.max_memory_allocated() / GIB, (needs.total - needs.runtime - needs.margin) / GIB, "GiB"),
            ("in use on the device", (total - free) / GIB, needs.total / GIB, "GiB"),
            ("step", statistics.median(seconds[3:]), step_time(run, cluster, backend).total, "s")]


def _random_batch(run, place, number: int) -> dict:
    import torch

    size, seq_len = run.train.micro_batch, run.train.seq_len
    text = torch.randint(0, run.model.vocab_size, (size, seq_len + 1), generator=torch.Generator().manual_seed(1000 * place.dp_rank + number))
    return dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(size, seq_len), position_ids=torch.arange(seq_len).expand(size, seq_len))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "several", "run"))
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--gpu", default="", help="kind of this machine's GPUs (engine/planner/cluster.py), where their name does not say it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="several: toy sizes on a CPU rank")
    parser.add_argument("--found", default="", metavar="FILE.json", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    from engine.config import ConfigError

    try:
        if args.what == "published":
            published()
            return 0
        if args.what == "several":
            if args.gpu or not args.tiny:
                args.gpu = kind_of_gpu(args.gpu)
            return several(args.gpu, args.steps, args.tiny)
        if not args.config:
            parser.error("run needs a configuration")
        return compare(args.config, args.overrides, args.gpu, args.steps, args.found)
    except ConfigError as error:
        print("error: " + "; ".join(error.problems), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
