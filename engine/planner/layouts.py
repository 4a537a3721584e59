"""Which layouts there are: every way to place a run on a number of GPUs, each put before the engine's own checks.

    for layout in layouts(base, cluster, pins): ...     # Layout(run, problems); without problems it is legal

pp is a divisor of the layers or a power of two; where layers do not divide evenly, parallel.pp_layers says how they are spread, and
also where they do: counted alone (memory), and with the output product as so many layers as it is worth (time).
A layout is a RunConfig with another `parallel` section, train.micro_batch and train.recompute. engine/checks.py says what is wrong with it, in the
words a user would read; nothing here knows a rule of its own, but for what is never worth trying: tp and etp beyond a node, cp that leaves a rank
less than 1,024 tokens of a sequence, cp with micro-batches above 1 (half of either is the same work with less traffic), and micro-batches or vpp
above 8 (vpp: where there is a smaller one). zero1 and, under tp, sequence_parallel are on wherever that is legal, since they cost
no traffic and save memory; so are the overlaps of a dp that there is.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from engine import torch_only
from engine.checks import cross_checks
from engine.config import RunConfig
from engine.planner.weights import spread, worth_of_output

AXES = ("tp", "pp", "vpp", "pp_layers", "cp", "ep", "etp", "sequence_parallel", "zero1")
LEAST_TOKENS, MOST_MICRO_BATCH, MOST_CHUNKS = 1024, 8, 8
RECOMPUTE = ("none", "selective", "full")      # from the fastest to the smallest


@dataclass(frozen=True)
class Layout:
    run: RunConfig
    problems: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """The first problem without its numbers and its cure, to group by."""
        return re.sub(r"\(-?\d+\)", "", self.problems[0].split(";")[0])


def placed(run: RunConfig, train: dict | None = None, **parallel) -> RunConfig:
    """The run with other fields of `parallel` and `train`."""
    update = {"parallel": run.parallel.model_copy(update=parallel)}
    return run.model_copy(update={**update, "train": run.train.model_copy(update=train)} if train else update)


def layouts(base: RunConfig, cluster, pins: dict, backend: str) -> Iterator[Layout]:
    """All of them for `base`, whose own layout does not matter. pins: axes and fields of train that are fixed, by name."""
    world = cluster.num_gpus

    def problems_of(run) -> tuple[str, ...]:
        return (*cross_checks(run, world), *(torch_only.limits(run) if backend == "te" else ()))

    for axes in _grids(base, cluster, pins):
        for i, micro_batch in enumerate(_micro_batches(base, axes, world, pins)):
            run = placed(base, {"micro_batch": micro_batch}, **_switches(base, axes, world))
            problems = problems_of(run)
            if problems and axes["sequence_parallel"] and "sequence_parallel" not in pins:
                without = placed(run, sequence_parallel=False, tp_comm_overlap=False)
                run, problems = (run, problems) if problems_of(without) else (without, ())
            yield Layout(run, problems)
            if problems and i == 0:
                break      # the least micro-batch is wrong already


def _grids(base, cluster, pins) -> Iterator[dict]:
    """Values of the axes, as far as they divide what they are to split."""
    world, model, seq_len = cluster.num_gpus, base.model, base.train.seq_len

    def values(name: str, found):
        return [pins[name]] if name in pins else list(found)

    worth = worth_of_output(model, seq_len)
    in_node, fixed = _divisors(min(cluster.per_node, world)), math.prod(pins.get(axis, 1) for axis in ("tp", "pp", "cp"))
    for tp in values("tp", in_node):
        for pp in values("pp", sorted({*_divisors(model.num_layers), *_powers(model.num_layers)})):
            for cp in values("cp", [1, *(cp for cp in _powers(world) if cp > 1 and seq_len // cp >= LEAST_TOKENS)]):
                if world % (tp * pp * cp) and tp * pp * cp != fixed:
                    continue      # no layout of that many GPUs; of what a user fixed the checks shall say so
                for vpp in values("vpp", _chunk_counts(model.num_layers, pp)):
                    for ep, etp in _experts(model, tp, world // pp, values):
                        for pp_layers in values("pp_layers", _spreads(model, pp, vpp, worth)):
                            yield dict(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, etp=etp, sequence_parallel=pins.get("sequence_parallel", tp > 1),
                                       zero1=pins.get("zero1", True), pp_layers=pp_layers)


def _spreads(model, pp: int, vpp: int, worth: int) -> list[list[int]]:
    """Values of pp_layers."""
    further = model.mtp.num_learning
    if pp == 1 or pp * vpp > model.num_layers:
        return [[]]
    even, weighed = (spread(model.num_layers, pp * vpp, further + more) for more in (0, worth))
    return [even, weighed] if weighed != even else [even]


def _experts(model, tp: int, ranks: int, values):
    """(ep, etp); etp 0 means tp."""
    if not model.moe.num_experts:
        return [(ep, etp) for ep in values("ep", [1]) for etp in values("etp", [0])]
    etps = values("etp", [0] if tp == 1 else [0, 1])
    return [(ep, etp) for ep in values("ep", _divisors(model.moe.num_experts)) for etp in etps if ranks % (ep * (etp or tp)) == 0]


def _micro_batches(base, axes, world: int, pins) -> list[int]:
    if "micro_batch" in pins:
        return [pins["micro_batch"]]
    if axes["cp"] > 1 and "cp" not in pins:
        return [1]
    dp = max(world // (axes["tp"] * axes["pp"] * axes["cp"]), 1)
    share = base.train.global_batch // dp
    return [size for size in _powers(MOST_MICRO_BATCH) if size <= share and base.train.global_batch % (size * dp) == 0] or [1]


def _switches(base, axes: dict, world: int) -> dict:
    """The axes with what goes with them: overlaps where there is something to overlap."""
    has_dp = world > axes["tp"] * axes["pp"]
    wants = base.parallel.tp_comm_overlap
    return {**axes, "overlap_grad_reduce": has_dp, "overlap_param_gather": has_dp and axes["zero1"],
            "tp_comm_overlap": wants and axes["tp"] > 1 and axes["sequence_parallel"]}


def _chunk_counts(layers: int, pp: int) -> list[int]:
    """Values of vpp: divisors of a rank's layers up to MOST_CHUNKS, and where there is none but 1 the next one (23 layers)."""
    found = [n for n in _divisors(-(-layers // pp)) if pp * n <= layers] if pp > 1 else [1]
    return [n for n in found if n <= MOST_CHUNKS or n == found[1]] or [1]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def text(run) -> str:
    """tp 2 pp 4 ... of a layout, in the order of ranks."""
    p = run.parallel
    named = [("tp", p.tp), ("cp", p.cp), ("ep", p.ep), ("etp", p.expert_tp if p.expert_tp != p.tp else 0), ("pp", p.pp), ("vpp", p.vpp)]
    shown = [f"{name} {size}" for name, size in named if size > 1 or name == "etp" and size or name in ("tp", "pp")]
    runs = [(size, len(list(group))) for size, group in groupby(p.pp_layers)]
    shown += ["layers " + " ".join(f"{num}x{size}" if num > 1 else str(size) for size, num in runs)] * bool(runs)
    fp8 = f", FP8 {run.train.fp8.recipe}" if run.train.fp8.recipe != "none" else ""
    return f"{', '.join(shown)}, micro-batch {run.train.micro_batch}, recompute {run.train.recompute}{fp8}"
