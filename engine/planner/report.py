"""What launch/plan.py prints and hands to programs: the table of the best, one layout in full, and why the others were refused.

    print(report(answer, base, cluster, own, options))     # 100 columns at most
    as_dict(answer, base, cluster, options)                # the same for --json
"""

from dataclasses import dataclass

from engine import metrics
from engine.planner import budget
from engine.planner.constants import GIB
from engine.planner.layouts import text
from engine.planner.search import Answer, Plan, backend_of

WORDS = {"elementwise": "norms, activations", "tp": "tensor parallel traffic", "cp": "context parallel traffic", "ep": "expert traffic",
         "pp": "pipeline traffic", "bubble": "pipeline bubble", "dp": "data parallel traffic", "gemm": "matrix products",
         "workspace": "backward temporaries", "runtime": "CUDA and NCCL", "margin": "fragmentation"}
NOTABLE = 0.05      # a difference between two ways of counting FLOPs that is told


@dataclass(frozen=True)
class Options:
    """top: rows of the table; tokens: of the whole run, 0 takes the configuration's; price: of a GPU hour; law: engine.recipe.scaling.Law;
    choose: the row that is told in full, from 1."""

    top: int = 10
    tokens: float = 0
    price: float = 0
    law: object = None
    choose: int = 1


def report(answer: Answer, base, cluster, own: tuple[Plan | None, list[str]], options: Options) -> str:
    parts = [_head(base, cluster)]
    if answer.plans:
        chosen = answer.plans[options.choose - 1]
        parts += [_table(answer.plans[:options.top], options), _own(own, answer), _whole(chosen, options), _money(chosen, options)]
    else:
        nothing = f"No layout fits into {cluster.gpu.memory_gib:g} GiB." if answer.misses else f"No layout is legal on {cluster.num_gpus} GPUs."
        parts += [_own(own, answer), nothing]
    return "\n\n".join(part for part in (*parts, _refused(answer, cluster)) if part)


def _head(base, cluster) -> str:
    count = metrics.num_parameters(base.model, base.train.seq_len)
    active = f", {_number(count.active)} of them for each token" if count.active < count.total else ""
    fp8 = "" if base.train.fp8.recipe == "none" else f" with FP8 ({base.train.fp8.recipe})"
    return (f"{base.model.family} {base.model.size}: {_number(count.total)} parameters{active}; sequences of {base.train.seq_len}, "
            f"{base.train.global_batch} per step; {base.train.precision}{fp8}, {backend_of(base)} layers\n{cluster}")


def _table(plans: list[Plan], options: Options) -> str:
    has_experts = plans[0].run.model.moe.num_experts > 0
    has_fp8 = any(plan.run.train.fp8.recipe != "none" for plan in plans)
    names = ["#", "tp", "cp", *(("ep", "etp") if has_experts else ()), "pp", "vpp", "dp", "micro", "recompute", *(("fp8",) if has_fp8 else ()),
             "GiB", "s/step", "TFLOP/s", "MFU", "tokens/s/GPU", "days"]
    rows = []
    for i, plan in enumerate(plans, start=1):
        p, train, cost = plan.run.parallel, plan.run.train, _cost(plan, options)
        experts = (p.ep, p.expert_tp) if has_experts else ()
        recipe = (train.fp8.recipe,) if has_fp8 else ()
        pp = f"{p.pp}*" if p.pp_layers else p.pp
        rows.append([i, p.tp, p.cp, *experts, pp, p.vpp, plan.dp, train.micro_batch, train.recompute, *recipe, f"{plan.memory.total / GIB:.1f}",
                     _seconds(plan.time.total), f"{plan.tflops:.0f}", f"{plan.mfu:.0%}", f"{plan.tokens_per_gpu:.0f}", _days(cost.days)])
    uneven = any(plan.run.parallel.pp_layers for plan in plans)
    spread = "\n * layers are spread unevenly (parallel.pp_layers), as --write and --json say" * uneven
    return f"{_columns([names, *rows])}{spread}\n{_counted(plans[0])}"


def _counted(best: Plan) -> str:
    """How the table counts FLOPs, and what the other usual way makes of it."""
    half = f";\n   with the half that the causal mask leaves, row 1 has {best.tflops * best.causal_share:.0f} TFLOP/s, MFU {best.mfu * best.causal_share:.0%}"
    return " FLOPs are those of Megatron's formula, attention counted in full" + half * (1 / best.causal_share - 1 > NOTABLE)


def _columns(rows) -> str:
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _own(own, answer: Answer) -> str:
    plan, problems = own
    if problems:
        return "The layout in the file is not legal here: " + problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    need = f"needs {gib(plan.memory.total, plan.cluster.gpu.memory_gib)} GiB"
    if not plan.fits:
        return f"The layout in the file ({text(plan.run)}) does not fit: it {need} of {plan.cluster.gpu.memory_gib:g}."
    rate = f", {plan.time.total / answer.plans[0].time.total:.2f} times the best one's step" if answer.plans else ""
    return f"The layout in the file ({text(plan.run)}) {need} and takes {_seconds(plan.time.total)} s per step{rate}."


def _whole(plan: Plan, options: Options) -> str:
    """Memory and time of one layout, part by part, side by side."""
    total, spent = plan.memory.total, plan.time.total
    memory = [(WORDS.get(name, name), f"{size / GIB:.2f}", f"{size / total:.0%}") for name, size in plan.memory.parts().items()]
    time = [(WORDS.get(name, name), f"{seconds:.3g}", f"{seconds / spent:.0%}") for name, seconds in plan.time.parts().items() if seconds > 0]
    room = plan.cluster.gpu.memory_gib
    memory = [(f"GiB on pp rank {plan.pp_rank}", f"{total / GIB:.2f}", f"of {room:g}"), *memory]
    time = [("seconds per step", _seconds(spent), ""), *time]
    blank = ("", "", "")
    lines = [(*(memory[i] if i < len(memory) else blank), *(time[i] if i < len(time) else blank)) for i in range(max(len(memory), len(time)))]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    body = ["  ".join(cell.ljust(width) if i in (0, 3) else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
    name = "Best" if options.choose == 1 else f"Row {options.choose}"
    return f"{name}: {text(plan.run)}\n" + "\n".join(f"  {line}" for line in body)


def _cost(plan: Plan, options: Options) -> budget.Budget:
    return budget.of_run(plan.run, plan.tokens_per_gpu * plan.cluster.num_gpus, plan.cluster.num_gpus, options.tokens, options.price)


def _money(plan: Plan, options: Options) -> str:
    cost = _cost(plan, options)
    price = f", {cost.price:,.0f} at {options.price:g} per GPU hour" if options.price else ""
    lines = [f"{_number(cost.tokens)} tokens: {_days(cost.days)} days without interruptions, {cost.gpu_hours:,.0f} GPU hours{price}."]
    if cost.tokens:
        sizes = budget.chinchilla(plan.run, cost.tokens, options.law)
        rule = "your law" if options.law else "20 tokens per parameter"
        lines.append(f"Compute-optimal ({rule}): this model wants {_number(sizes.best_tokens)} tokens; this run's compute, "
                     f"{_number(sizes.best_parameters)} parameters and {_number(sizes.tokens_of_best)} tokens.")
    return "\n".join(lines)


def _refused(answer: Answer, cluster) -> str:
    groups = sorted(answer.refused.items(), key=lambda group: -group[1].count)
    lines = []
    if answer.misses:
        least, most = (gib(answer.misses[i][0], cluster.gpu.memory_gib) for i in (0, -1))
        span = f"{least} to {most}" if len(answer.misses) > 1 else least
        lines.append(f"  {len(answer.misses)}: {span} GiB needed, of {cluster.gpu.memory_gib:g}, whatever is recomputed. "
                     f"Nearest: {text(answer.misses[0][1])}")
    lines += [f"  {group.count}: {reason}\n     such as: {group.example}" for reason, group in groups[:6]]
    if len(groups) > 6:
        lines.append(f"  {sum(group.count for _, group in groups[6:])}: {len(groups) - 6} other reasons (--json has all)")
    if not lines:
        return f"Fitting: {len(answer.plans)}; none refused."
    return f"Fitting: {len(answer.plans)}; refused: {answer.num_refused + len(answer.misses)}\n" + "\n".join(lines)


def as_dict(answer: Answer, base, cluster, options: Options) -> dict:
    """What report says, for programs: bytes, seconds and full sentences."""
    count = metrics.num_parameters(base.model, base.train.seq_len)
    return {
        "parameters": count.total, "active_parameters": count.active, "backend": backend_of(base),
        "cluster": {"gpu": cluster.gpu.name, "gpus": cluster.num_gpus, "nodes": cluster.num_nodes, "memory_gib": cluster.gpu.memory_gib,
                    "network_gbs": cluster.network_gbs},
        "num_fitting": len(answer.plans), **({"chosen": options.choose} if answer.plans else {}),
        "plans": [_plan(plan, options) for plan in answer.plans[:options.top]],
        "refused": [{"count": group.count, "reason": reason, "example": group.example} for reason, group in answer.refused.items()],
        "do_not_fit": {"count": len(answer.misses), **({"least_bytes": answer.misses[0][0], "nearest": text(answer.misses[0][1])} if answer.misses else {})},
    }


def _plan(plan: Plan, options: Options) -> dict:
    cost = _cost(plan, options)
    return {"parallel": plan.run.parallel.model_dump(), "micro_batch": plan.run.train.micro_batch, "recompute": plan.run.train.recompute,
            "fp8": plan.run.train.fp8.recipe, "dp": plan.dp,
            "memory_bytes": {**plan.memory.parts(), "total": plan.memory.total}, "step_seconds": {**plan.time.parts(), "total": plan.time.total},
            "tflops_per_gpu": plan.tflops, "mfu": plan.mfu, "causal_tflops_per_gpu": plan.tflops * plan.causal_share,
            "causal_mfu": plan.mfu * plan.causal_share, "tokens_per_second_per_gpu": plan.tokens_per_gpu, "tokens": cost.tokens,
            "days": cost.days, "gpu_hours": cost.gpu_hours, "price": cost.price}


def gib(num_bytes: int, room: float) -> str:
    """GiB, with as many decimals as it takes to differ from the GiB there are."""
    need = num_bytes / GIB
    decimals = next((n for n in range(1, 9) if f"{need:.{n}f}" != f"{room:.{n}f}"), 1)
    return f"{need:.{decimals}f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def _days(days: float) -> str:
    return f"{days:.3g}" if days >= 0.01 else "<0.01"


def _number(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"
