"""Where nothing fits: the nearest miss, and what would make something fit, each tried with the planner itself.

    print(what_would_help(answer, base, cluster, pins))
"""

from engine.planner.cluster import Cluster, larger
from engine.planner.constants import GIB
from engine.planner.layouts import placed, text
from engine.planner.report import gib
from engine.planner.search import Answer, backend_of, search

MOST_TIMES = 64      # as many GPUs as were asked for are tried


def what_would_help(answer: Answer, base, cluster: Cluster, pins: dict) -> str:
    lines = []
    if answer.misses:
        need, run = answer.misses[0]
        room = cluster.gpu.memory_gib
        lines.append(f"Nearest miss: {text(run)} needs {gib(need, room)} GiB, {gib(need - int(room * GIB), 0)} more than a GPU has.")
    helps = [*_more_gpus(base, cluster, pins), *_other_batch(answer, base, cluster, pins), *_smaller(base, cluster, pins)]
    if pins and search(base, cluster, {}).plans:
        helps.append(f"leaving the layout free: overrides fix {', '.join(pins)}")
    if not helps:
        return "\n".join([*lines, f"Neither more GPUs ({MOST_TIMES} times as many were tried) nor any change the planner tries would make it fit; "
                                  "the model is too large for this kind of GPU, or no layout of it is legal (the reasons are above)."])
    return "\n".join([*lines, "What would help:", *(f"  - {line}" for line in helps)])


def _more_gpus(base, cluster: Cluster, pins):
    for more in larger(cluster, MOST_TIMES):
        found = search(base, more, pins).plans
        if found:
            yield f"{more.num_gpus} GPUs ({more.nodes}): {text(found[0].run)} needs {found[0].memory.total / GIB:.1f} GiB"
            return


def _other_batch(answer: Answer, base, cluster: Cluster, pins):
    """The nearest global batch that every dp divides, where the one there is was a reason."""
    if not any("train.global_batch" in reason for reason in answer.refused):
        return
    world, batch = cluster.num_gpus, base.train.global_batch
    batch = max((batch + world // 2) // world, 1) * world
    found = search(placed(base, {"global_batch": batch}), cluster, pins).plans
    if found:
        field = "global_batch" if base.stage == "long_context" else "train.global_batch"      # a rung may have its own
        yield f"{field}={batch}, a multiple of {world}: {text(found[0].run)} needs {found[0].memory.total / GIB:.1f} GiB"


def _smaller(base, cluster: Cluster, pins):
    """Changes of the configuration that cost little, those that suffice by themselves."""
    train, optim = base.train, base.optim
    tried = []
    if backend_of(base) == "te" and train.precision == "bf16" and not optim.precision_aware:
        tried.append(("optim.precision_aware=true (moments and gradients in bf16)",
                      base.model_copy(update={"optim": optim.model_copy(update={"precision_aware": True})})))
    if train.precision == "fp32":
        tried.append(("train.precision=bf16", placed(base, {"precision": "bf16"})))
    if train.seq_len >= 2048:
        tried.append((f"train.seq_len={train.seq_len // 2}, if the task allows it", placed(base, {"seq_len": train.seq_len // 2})))
    for words, changed in tried:
        found = search(changed, cluster, pins).plans
        if found:
            yield f"{words}: {text(found[0].run)} needs {found[0].memory.total / GIB:.1f} GiB"
