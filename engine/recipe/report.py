"""What a recipe shows: its plan before it starts, and at the end one table (stage x measure) and one page.

    print(plan_text(plan, state, speed=0))
    print(table(plan, state))
    write_report(plan, state)          # DIR/table.md and DIR/report.html, which holds its pictures

Left out: live pages; metrics.jsonl and tb/ of each stage are written as it runs.
"""

import base64
import html
import io
import math
from typing import Any

from engine import metrics
from engine.recipe import outcome
from engine.recipe.estimate import estimate
from engine.recipe.launcher import clock
from engine.recipe.plan import Plan, Step
from engine.run_folder import find
from engine.stages import loaded

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}}table{{border-collapse:collapse;margin:1em 0}}
td,th{{border-bottom:1px solid #ccc;padding:.25em .8em;text-align:right}}td:first-child,th:first-child{{text-align:left}}.shut{{color:#b00}}
.left td,.left th{{text-align:left}}img{{max-width:100%}}code{{font-size:90%}}</style>
{body}</html>
"""


def columns(rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table whose columns line up; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * max(width, 3) for width in widths) + " |", *lines[1:]])


# --- before ---------------------------------------------------------------------------------------------------------------


def plan_text(plan: Plan, state: dict[str, Any], speed: float = 0.0) -> str:
    """Stages in order with layout, steps, tokens, parameters, FLOPs, time; checkpoints read and written; gates and measures."""
    costs = {step.name: estimate(step, plan, speed) for step in plan.steps}
    rows = [["stage", "kind", "starts from", "ranks", "layout", "steps", "tokens", "parameters", "FLOPs", "time", "now"]]
    for step in plan.steps:
        cost = costs[step.name]
        parameters = metrics.num_parameters(step.runs[-1].model, step.runs[-1].train.seq_len).total
        rows.append([step.name, step.kind, step.start or _external(step) or "nothing", str(step.ranks), layout(step), str(cost.steps),
                     short(cost.tokens), short(parameters), short(cost.flops), _time(cost.seconds), _status(step, state)])
    tokens, flops, seconds = (sum(getattr(cost, name) for cost in costs.values()) for name in ("tokens", "flops", "seconds"))
    lines = [f"{plan.path}: {len(plan.steps)} stages in {plan.dir}", "", columns(rows), "",
             f"all stages: {short(tokens)} tokens, {short(flops)} FLOPs, {_time(seconds)}"]
    bases = {}
    for name, cost in costs.items():
        bases.setdefault(cost.basis, []).append(name)
    lines += [f"time of {', '.join(names)}: based on {basis}" for basis, names in bases.items()]
    lines += ["Tokens and FLOPs are those of full rows through the network that learns; rollouts, references and validation come on top.", ""]
    for step in plan.steps:
        reads = [f"{role} {plan.step(source).result}" for role, source in step.sources.items()] + ([_external(step)] if _external(step) else [])
        lines.append(f"{step.name}: reads {', '.join(reads) or 'no checkpoint'}; writes {step.result}/checkpoints")
        lines += [f"  gate: {gate_text(gate)}" for gate in step.entry.gates]
        taken = [measure.name for measure in plan.measures_after(step.name)]
        lines += [f"  measures: {', '.join(taken)}"] if taken else []
    return "\n".join(lines)


def gate_text(gate) -> str:
    least = gate.at_least is not None or gate.at_least_of
    other = gate.at_least_of or gate.at_most_of
    limit = f"{other}" if other else f"{gate.at_least if least else gate.at_most:g}"
    limit += f" * {gate.times:g}" * (gate.times != 1) + f" + {gate.plus:g}" * (gate.plus != 0) + f" - {gate.minus:g}" * (gate.minus != 0)
    what = f"{outcome.key_of(gate)} at {'least' if least else 'most'} {limit}"
    return f"{what}, else {gate.on_failure}" + f" to {gate.rollback_to}" * bool(gate.rollback_to)


def layout(step: Step) -> str:
    """TP2-DP4, leaving out axes of 1."""
    p = step.run.parallel
    sizes = {"TP": p.tp, "PP": p.pp, "CP": p.cp, "EP": p.ep, "DP": step.ranks // (p.tp * p.pp * p.cp)}
    return "-".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for factor, unit in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:g}"


def _external(step: Step) -> str:
    return "" if step.start else step.run.checkpoint.load


def _time(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else clock(seconds)


def _status(step: Step, state: dict[str, Any]) -> str:
    entry, found = state["stages"].get(step.name), find(step.result)
    if entry and entry["status"] == "done":
        return "done"
    if entry and found:
        return f"resumes at step {loaded.position(found)['step']}"
    return "to do"


# --- after ----------------------------------------------------------------------------------------------------------------


def table(plan: Plan, state: dict[str, Any]) -> str:
    """One row per stage that is done: what it started from, its tokens and time, every measure, its gates."""
    return columns(_table_rows(plan, state))


def _table_rows(plan: Plan, state: dict[str, Any]) -> list[list[str]]:
    shown = [(measure.name, name) for measure in plan.measures for name in measure.entry.metrics]
    rows = [["after", "starts from", "tokens", "time", "own loss", *(f"{measure}: {name}" for measure, name in shown), "gates"]]
    for step in plan.steps:
        entry = state["stages"].get(step.name)
        if not entry or entry["status"] != "done":
            continue
        measured = {name: found["numbers"] for name, found in entry["measured"].items()}
        cells = [_number(measured.get(measure, {}).get(name)) for measure, name in shown]
        parents = ", ".join(name if role == "load" else f"{role}: {name}" for role, name in entry["parents"].items())
        rows.append([step.name, parents, short(entry["position"]["tokens"]), clock(entry["seconds"]), _own_loss(step, entry), *cells, _gates(entry)])
    return rows


def _own_loss(step: Step, entry: dict[str, Any]) -> str:
    losses = [entry["numbers"][f"{name}/valid_loss"] for name in step.sets if f"{name}/valid_loss" in entry["numbers"]]
    return _number(losses[0] if losses else None)


def _gates(entry: dict[str, Any]) -> str:
    shut = [verdict for verdict in entry["verdicts"] if not verdict["passed"]]
    if not shut:
        return "open" if entry["verdicts"] else ""
    return "; ".join(map(_shut, shut))


def _shut(verdict: dict[str, Any]) -> str:
    return f"shut ({verdict['on_failure']}" + f" to {verdict['rollback_to']}" * bool(verdict["rollback_to"]) + ")"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_report(plan: Plan, state: dict[str, Any]) -> None:
    """table.md and report.html in the recipe's folder."""
    (plan.dir / "table.md").write_text(table(plan, state) + "\n")
    done = [step for step in plan.steps if state["stages"].get(step.name, {}).get("status") == "done"]
    if not done:
        return
    parts = [f"<h1>{html.escape(str(plan.path))}</h1>", _html(_table_rows(plan, state))]
    parts += ["<h2>Gates</h2>", _gate_html(done, state), "<h2>Where losses began</h2>", _boundary_html(plan, done, state)]
    parts += ["<h2>Measures after each stage</h2>", _measure_picture(plan, done, state), "<h2>Losses</h2>"]
    parts += [_loss_picture(step) for step in done]
    parts += ["<h2>Lineage</h2>", _lineage_html(done, state)]
    (plan.dir / "report.html").write_text(PAGE.format(title=html.escape(plan.path.stem), body="\n".join(parts)))


def _html(rows: list[list[str]], kind: str = "") -> str:
    cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in zip(["th", *["td"] * len(rows)], rows)]
    return f"<table class='{kind}'>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _gate_html(done: list[Step], state: dict[str, Any]) -> str:
    rows = [[step.name, verdict["what"], _number(verdict["value"]), "open" if verdict["passed"] else _shut(verdict)]
            for step in done for verdict in state["stages"][step.name]["verdicts"]]
    return _html([["stage", "asked", "found", "verdict"], *rows], "left") if rows else "<p>This recipe has no gates.</p>"


def _boundary_html(plan: Plan, done: list[Step], state: dict[str, Any]) -> str:
    rows = [["stage", "stage before, at its end", "before the first step", "ratio", "first training loss", "highest soon after", "rise", "spike"]]
    for step in done:
        entry = state["stages"][step.name]
        found = entry["boundary"]
        rows.append([step.name, *(_number(found.get(name)) for name in ("before", "start", "start_ratio", "first", "peak")),
                     f"{found['rise']:+.1%}" if "rise" in found else "", "yes" if entry["spikes"] else "no"])
    spike = plan.recipe.spike
    return _html(rows) + (f"<p>Rule: a spike is a loss before the first step more than {spike.tolerance:.0%} above the one at which the stage "
                          f"before it ended (same set, length and kind of loss), or a mean of {spike.window} training losses that rises by more "
                          f"than that within the first {spike.share:.0%} of the steps.</p>")


def _lineage_html(done: list[Step], state: dict[str, Any]) -> str:
    rows = [["stage", "kind", "starts from", "steps", "checkpoint", "identity", "from", "to"]]
    for step in done:
        entry = state["stages"][step.name]
        parents = ", ".join(f"{role}: {name}" for role, name in entry["parents"].items()) or step.run.checkpoint.load
        rows.append([step.name, step.kind, parents, str(entry["position"]["step"]), str(find(step.result) or "gone"), entry["identity"][:12],
                     entry["began"], entry["ended"]])
    return _html(rows, "left") + "<p>Each folder checkpoints/ holds lineage.json: configuration, data files with their hashes, parents, numbers.</p>"


def _loss_picture(step: Step) -> str:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    offset, parts = 0, outcome.curve(step)
    for lines in parts:
        losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
        axes.plot([offset + line["step"] for line in lines], losses, "C0", linewidth=1, label="training" if lines is parts[0] else None)
        offset += lines[-1]["step"] if lines else 0
        if lines is not parts[-1]:
            axes.axvline(offset, color="grey", linewidth=0.8, linestyle=":")
    for i, (name, points) in enumerate(outcome.validation_curves(step).items(), start=1):
        axes.plot(*zip(*points), "o-", color=f"C{i}", markersize=4, label=name)
    axes.set(title=f"{step.name} ({step.kind}, {layout(step)})", xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    return _image(pyplot, figure)


def _measure_picture(plan: Plan, done: list[Step], state: dict[str, Any]) -> str:
    if not plan.measures:
        return "<p>This recipe has no measures.</p>"
    pyplot = _pyplot()
    shown = [(measure.name, name) for measure in plan.measures for name in measure.entry.metrics]
    figure, grid = pyplot.subplots(1, len(shown), figsize=(3.2 * len(shown) + 1, 3.2), layout="constrained", squeeze=False)
    for axes, (measure, name) in zip(grid[0], shown):
        points = [(step.name, found[measure]["numbers"][name]) for step in done if measure in (found := state["stages"][step.name]["measured"])]
        if points:
            axes.plot(*zip(*points), "o-")
        axes.set(title=f"{measure}: {name}")
        axes.tick_params(axis="x", rotation=45)
        axes.grid(alpha=0.3)
    return _image(pyplot, figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _image(pyplot, figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    pyplot.close(figure)
    return f"<p><img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'></p>"
