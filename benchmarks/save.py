"""Saving beside torch's distributed checkpoint (DCP) and a bare write: GB/s, and how long an asynchronous save holds training up.

    python benchmarks/save.py [--rounds 3] [--millions 100] [--folder DIR] [--only sync,async]

Two ranks on gloo, one thread each. What they save has the shape of a network's weights and Adam's two moments in fp32 (12 bytes per
parameter): `replicated`, where both ranks hold all of it (data parallel), or `sharded`, where each holds half of every tensor (tensor parallel).
Contestants take turns. `raw` writes each rank's half of the bytes in blocks of 8 MiB and calls fsync. DCP writes with fsync too, with as many
threads as we, and a cached plan. Asynchronous: each rank computes (matrix products, one thread), changes every tensor in place, as an optimizer
does, and computes on. `blocked` is the time in the call, and for us also the wait before tensors change; DCP stages in the call, into memory that it
keeps from save to save (DefaultStager). `added` is what the steps around a save, until it is written, took longer than as many steps without.
Left out: GPUs, several machines.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

NUM_RANKS = 2
STEP_SECONDS = 1.0  # of computing between two changes of the tensors; of a network of this size it is a small batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--millions", type=int, default=100, help="parameters, in millions")
    parser.add_argument("--folder", default=None, help="where to write; the default is the system's temporary folder")
    parser.add_argument("--only", default="sync,async")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    os.environ.update(OMP_NUM_THREADS="1")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    warnings.filterwarnings("ignore")
    import torch  # noqa: F401  the ranks are forks of this process
    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    import engine.mcore.saving_run  # noqa: F401

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        children = [os.fork() or _child(rank, Path(folder), arguments) for rank in range(NUM_RANKS)]
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _child(rank: int, folder: Path, arguments) -> None:
    code = 1
    try:
        _rank(rank, folder, arguments)
        code = 0
    except Exception:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _rank(rank: int, folder: Path, arguments) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    say = print if rank == 0 else lambda *text, **how: None
    for layout in ("replicated", "sharded"):
        shapes = _shapes(arguments.millions)
        tensors = {name: torch.rand(shape if layout == "replicated" else (shape[0] // NUM_RANKS, *shape[1:])) for name, shape in shapes.items()}
        num_bytes = sum(4 * shape.numel() for shape in map(torch.Size, shapes.values()))
        if "sync" in arguments.only and layout == "replicated":
            for i in range(arguments.rounds):
                found = {name: _timed(folder, act, tensors, layout) for name, act in (("raw", _raw), ("DCP", _dcp), ("ours", _ours))}
                say(f"{layout}, round {i}: " + ", ".join(f"{name} {num_bytes / seconds / 1e9:.3f} GB/s" for name, seconds in found.items()), flush=True)
                _keep(("sync", layout), found)
            _table("sync", layout, say, lambda seconds: f"{num_bytes / seconds / 1e9:.3f} GB/s")
        if "async" in arguments.only:
            _asynchronous(folder, tensors, layout, arguments.rounds, say)


_found: dict = {}


def _keep(what, found: dict) -> None:
    for name, value in found.items():
        _found.setdefault((*what, name), []).append(value)


def _table(kind: str, layout: str, say, text) -> None:
    """The median of each contestant, and ours over (or by time, under) the others': above 1 is better for GB/s, below 1 for seconds."""
    medians = {name: statistics.median(values) for (*what, name), values in _found.items() if what == [kind, layout]}
    ours = medians["ours"]
    ratios = [f"ours / {name} {value / ours if kind == 'sync' else ours / value:.2f}" for name, value in medians.items() if name != "ours"]
    say(f"| {kind}, {layout} | {' | '.join(f'{name} {text(value)}' for name, value in medians.items())} | {', '.join(ratios)} |", flush=True)


def _shapes(millions: int) -> dict[str, tuple[int, int]]:
    """Weights and moments of about so many parameters: an embedding and layers of hidden size 768."""
    layers = max((millions - 25) * 1_000_000 // (12 * 768 * 768), 1)
    one = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072), "norm": (768, 1)}
    weights = {"embedding": (32768, 768), **{f"layer{i}.{name}": shape for i in range(layers) for name, shape in one.items()}}
    return {f"{kind}.{name}": shape for kind in ("weight", "exp_avg", "exp_avg_sq") for name, shape in weights.items()}


def _timed(folder: Path, act, tensors, layout: str) -> float:
    """Seconds until both ranks have saved into an empty folder, whatever was written before being on the disk."""
    import torch.distributed as dist

    _empty(folder)
    started = time.perf_counter()
    act(folder / "saved", tensors, layout)
    dist.barrier()
    return time.perf_counter() - started


def _empty(folder: Path) -> None:
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "saved", ignore_errors=True)
        (folder / "saved").mkdir()
        os.sync()
    dist.barrier()


# --- contestants -----------------------------------------------------------------------------------------------------


def _raw(folder: Path, tensors, layout: str) -> None:
    import torch
    import torch.distributed as dist

    rank, own = dist.get_rank(), list(tensors.values())
    if layout == "replicated":
        own = own[rank::NUM_RANKS]
    with open(folder / f"raw{rank}", "wb", buffering=0) as file:
        for tensor in own:
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            for begin in range(0, len(data), 8 << 20):
                file.write(data[begin:begin + (8 << 20)])
        os.fsync(file.fileno())


def _for_dcp(tensors, layout: str) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if layout == "replicated":
        return dict(tensors)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    return {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def _writer(folder: Path):
    from torch.distributed.checkpoint import FileSystemWriter

    from engine.mcore.saving_plan import NUM_THREADS

    return FileSystemWriter(folder, single_file_per_rank=False, thread_count=NUM_THREADS, sync_files=True)


def _planner():
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    return DefaultSavePlanner(enable_plan_caching=True)


def _dcp(folder: Path, tensors, layout: str) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(_for_dcp(tensors, layout), storage_writer=_writer(folder), planner=_planner())


def _parts(tensors, layout: str) -> list:
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from engine.mcore.saving_plan import Part

    rank = dist.get_rank()
    how = (lambda name, tensor: ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank)) if layout == "replicated" else \
        (lambda name, tensor: ShardedTensor.from_rank_offsets(name, tensor, (0, rank, NUM_RANKS)))
    return [Part("", {name: how(name, tensor) for name, tensor in tensors.items()})]


def _ours(folder: Path, tensors, layout: str) -> None:
    from engine.mcore import saving

    saving.save(folder / "iter_0000001", _parts(tensors, layout))


# --- asynchronous ------------------------------------------------------------------------------------------------------


def _asynchronous(folder: Path, tensors, layout: str, rounds: int, say) -> None:
    """The first save of each contestant fills its staging memory and is not counted."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    from engine.mcore import saving_run
    from engine.safety_sections import Checkpoint

    stager, group = DefaultStager(StagingOptions(False, False, False, False)), dist.new_group(backend="gloo")
    saver = saving_run.Saver(Checkpoint(async_save=True), 10, note=lambda text: None)

    def ours():
        saver.save({folder / "saved" / "iter_0000001": _parts(tensors, layout)})
        return saver.copied, lambda: saver._underway.is_done(), saver.finish

    def theirs():
        future = dcp.async_save(_for_dcp(tensors, layout), storage_writer=_writer(folder / "saved"), planner=_planner(), process_group=group,
                                async_stager=stager)
        future = getattr(future, "upload_completion", future)
        return lambda: None, future.done, future.result

    for i in range(rounds + 1):
        blocked, added = {}, {}
        for name, begin in (("DCP", theirs), ("ours", ours)):
            _empty(folder)
            blocked[name], added[name] = _loop(begin, tensors)
        if i:
            say(f"async {layout}, round {i}: " + ", ".join(f"{name} blocked {blocked[name]:.3f} s, added {added[name]:.3f} s" for name in blocked), flush=True)
            _keep(("async blocked", layout), blocked)
            _keep(("async added", layout), added)
    for kind in ("async blocked", "async added"):
        _table(kind, layout, say, lambda seconds: f"{seconds:.3f} s")
    stager.close()


def _loop(begin, tensors) -> tuple[float, float]:
    """(seconds in which training could not go on, seconds that the steps took longer), the longest of the ranks'."""
    import torch
    import torch.distributed as dist

    def compute(units: int):
        for _ in range(units):
            torch.mm(left, left)

    def change():
        for tensor in tensors.values():
            tensor.add_(1e-3)

    left = torch.rand(512, 512)
    started = time.perf_counter()
    compute(20)
    units = max(int(20 * STEP_SECONDS / (time.perf_counter() - started)), 1)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(2):
        compute(units)
        change()
    dist.barrier()
    usual = (time.perf_counter() - started) / 2

    started = time.perf_counter()
    may_change, is_done, finish = begin()
    blocked, steps = time.perf_counter() - started, 0
    everybody = torch.zeros(1)
    while not everybody.item():
        compute(units)
        waited = time.perf_counter()
        if not steps:
            may_change()
        blocked += time.perf_counter() - waited
        change()
        steps += 1
        everybody = torch.tensor(float(is_done()))
        dist.all_reduce(everybody, op=dist.ReduceOp.MIN)
    finish()
    dist.barrier()
    found = torch.tensor([blocked, time.perf_counter() - started - steps * usual])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found[0].item(), found[1].item()


if __name__ == "__main__":
    sys.exit(main())
