"""Run a function on N gloo ranks that stay up between tests.

    results = ranks.run(4, function, *args)      # function(*args) on each rank; a list by rank

Importing megatron costs seconds, so a fork server imports it once and each rank is a fork of it; a job on fewer ranks uses the
first of them and only makes new process groups. A rank that raises fails the caller with every rank's traceback and the pool is
replaced, as it is when a job takes longer than `timeout`. Functions and arguments are pickled: define functions at module level.
"""

import atexit
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

# A MoE model is kept alive by autograd hooks that no garbage collector sees, and with it the threads of its process groups,
# some fifty a job; a new fork costs less than they do.
JOBS_PER_POOL = 12
TESTS = Path(__file__).parent
_pool: list = []
_num_jobs = 0


class RankError(AssertionError):
    """A function failed on some rank; the message holds the tracebacks."""


def run(num_ranks: int, function, *args, timeout: float = 240.0) -> list:
    """function(*args) on ranks 0..num_ranks-1 under torchrun's environment variables. Returns their results in rank order."""
    global _num_jobs
    if _num_jobs == JOBS_PER_POOL:
        shutdown()
    _num_jobs += 1
    _grow(num_ranks)
    workers = _pool[:num_ranks]
    store = tempfile.mktemp(prefix="trireme-store-")
    for rank, (_, pipe) in enumerate(workers):
        pipe.send((function, args, rank, num_ranks, store))
    results, errors = {}, {}
    while len(results) + len(errors) < num_ranks:
        pending = [pipe for rank, (_, pipe) in enumerate(workers) if rank not in results and rank not in errors]
        ready = wait(pending, timeout=20 if errors else timeout)
        if not ready:
            shutdown()
            raise RankError(_report(errors) or f"no answer from ranks {sorted(set(range(num_ranks)) - results.keys())} in {timeout} s")
        for rank, (_, pipe) in enumerate(workers):
            if pipe in ready:
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else errors)[rank] = value
    if errors:
        shutdown()
        raise RankError(_report(errors))
    return [results[rank] for rank in range(num_ranks)]


def shutdown() -> None:
    """End every rank; the next run starts new ones. An idle rank leaves by itself, and with it the helper processes that megatron
    starts for checkpoints; one that is stuck is killed."""
    for _, pipe in _pool:
        try:
            pipe.send(None)
        except OSError:
            pass  # it died already
    for process, _ in _pool:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
    _pool.clear()
    global _num_jobs
    _num_jobs = 0


atexit.register(shutdown)


def _report(errors: dict) -> str:
    return "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(errors.items()))


def _grow(num_ranks: int) -> None:
    context = mp.get_context("forkserver")
    _start_server(context)
    while len(_pool) < num_ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        _pool.append((process, ours))


def _start_server(context) -> None:
    """The fork server, unless it runs. CPython 3.11's has not our sys.path when it imports what it is to preload (gh-117378), and it
    goes on without what it does not find, so PYTHONPATH tells it; ranks_preload.py takes that back."""
    context.set_forkserver_preload(["ranks_preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)] + ([before] if before is not None else []))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _serve(pipe) -> None:
    """A rank: wait for a job, join a world of its size, answer."""
    assert "ranks_preload" in sys.modules, "the fork server has not preloaded it, so each rank would import everything again"
    import torch
    import torch.distributed as dist

    from engine.mcore import topology

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        function, args, rank, num_ranks, store = job
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
            dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
            dist.barrier()  # a rank that is done at once would close connections that others are still making
            pipe.send((True, function(*args)))
            topology.stop()
        except BaseException:
            pipe.send((False, traceback.format_exc()))
