"""Contestants of a benchmark take turns: each lives in a process of its own that stays up, and they go one step each, round by round.

    arguments = add_arguments(argparse.ArgumentParser(), CONTESTANTS, rounds=7).parse_args()
    turns = take_turns(chosen(CONTESTANTS, arguments.only), arguments, describe)     # by name: seconds of each round

CONTESTANTS is name -> (function, its keyword arguments). The function is called in the contestant's process and returns step(i), which takes
step number i and returns what `describe` makes a line of. A slow minute of the machine is everybody's, so compare within one run, by
the median over the rounds. A contestant whose library is missing is named and left out. Left out: GPUs, and contestants of several ranks.
"""

import argparse
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

WARM_UP = 3  # steps that compile, allocate and create optimizer state


def add_arguments(parser: argparse.ArgumentParser, names, rounds: int) -> argparse.ArgumentParser:
    """The options that every such benchmark has; rounds: the default number."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-memory", action="store_true", help="give the peers our allocator setting too (engine/mcore/cpu.py)")
    parser.add_argument("--only", default="", help="names, comma-separated: " + ", ".join(names))
    return parser


def chosen(contestants: Mapping[str, tuple], only: str) -> dict[str, tuple]:
    """The contestants that --only names: by name, or by what stands before the colon of several names; all when it is empty.

    Exits with a message for what names none.
    """
    asked = only.split(",") if only else list(contestants)
    for name in asked:
        if not any(name in (own, group(own)) for own in contestants):
            sys.exit(f"--only={only}: no contestant is called {name!r}; there are {', '.join(contestants)}")
    return {own: value for own, value in contestants.items() if own in asked or group(own) in asked}


def group(name: str) -> str:
    """What stands before the colon of a contestant's name, the whole name where there is none."""
    return name.partition(":")[0]


@dataclass
class Turns:
    """What one contestant did."""

    answers: list
    """What each warm-up step returned."""
    seconds: list[float] = field(default_factory=list)
    """Of each round, by the clock on the wall."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of each round, summed over its threads: what other programs take from a shared machine is not in it."""


def take_turns(contestants: Mapping[str, tuple], arguments: argparse.Namespace, describe: Callable[[list], str]) -> dict[str, Turns]:
    """Every contestant's Turns, by name. Prints a line for each: its state, and what `describe` says of its warm-up's answers."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    context = mp.get_context("spawn")
    pipes, turns, processes = {}, {}, []
    for name, (function, kwargs) in contestants.items():
        pipe, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(function, kwargs, arguments.threads, arguments.keep_memory, theirs), daemon=True))
        processes[-1].start()
        state, detail = pipe.recv()
        print(f"{name}: {state}" + (f" ({detail})" if state != "ready" else f", {describe(detail)}"), flush=True)
        if state == "ready":
            pipes[name], turns[name] = pipe, Turns(detail)
    for i in range(arguments.rounds):
        for name, pipe in pipes.items():
            pipe.send(WARM_UP + i)
            seconds, cpu_seconds = pipe.recv()
            turns[name].seconds.append(seconds)
            turns[name].cpu_seconds.append(cpu_seconds)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(timeout=30)  # a library's threads may keep it; what is left ends with this process
    return turns


def _serve(function, kwargs: dict, threads: int, keep_memory: bool, pipe) -> None:
    """Build a contestant and warm it up, then take one step for every number received and answer with its seconds, wall and CPU."""
    os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", TORCHINDUCTOR_COMPILE_THREADS="1")
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_memory:
        from engine.mcore import cpu

        cpu.keep_memory()
    try:
        step = function(**kwargs)
        pipe.send(("ready", [step(i) for i in range(WARM_UP)]))
    except ImportError as error:
        pipe.send(("missing", str(error)))
        return
    except Exception:
        pipe.send(("failed", traceback.format_exc(limit=-3)))
        return
    while (i := pipe.recv()) is not None:
        start = time.perf_counter(), time.process_time()
        step(i)
        pipe.send((time.perf_counter() - start[0], time.process_time() - start[1]))
