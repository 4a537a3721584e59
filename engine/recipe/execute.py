"""Run a plan: what is done stays done, the rest runs in order, every gate is judged, and state.json remembers.

    Execution(plan, launch).run(redo=["sft"])      # RecipeStopped where a person must decide

DIR/NAME/ is the run folder of stage NAME, with stage.yaml (what its launcher got), output.log, and measures/MEASURE/. DIR/state.json holds, per
stage, the identity of its configuration and its parents, and what was found. Killed at any point, the same recipe goes on: a stage that was not
done starts again and resumes its own checkpoints. Gates are judged at every start from recorded numbers, so a gate may be changed afterwards.
Left out: running independent stages at once.
"""

import datetime
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine import schedule
from engine.recipe import lineage, outcome
from engine.recipe.launcher import Job, clock
from engine.recipe.lineage import write_json
from engine.recipe.plan import Measure, Plan, Step, identity
from engine.run_folder import find
from engine.stages import loaded

NUM_LINES = 15      # of a failed stage's output that are shown


class RecipeStopped(ValueError):
    """The recipe cannot go on without a person: a gate, a failed stage, or a recipe that no longer fits what is done."""


class Execution:
    """One start of a recipe. launch(job): runs it, returns its exit code. say(line): tells the user."""

    def __init__(self, plan: Plan, launch: Callable[[Job], int], say: Callable[[str], None] = print):
        self.plan, self.launch, self.say = plan, launch, say
        self.path = plan.dir / "state.json"
        self.state = read_state(plan)
        self.stands_for: dict[str, str] = {}
        """Stage that was rolled back -> the earlier one whose checkpoint later stages take."""

    def run(self, redo: list[str] = ()) -> None:
        """Raises RecipeStopped."""
        self.plan.dir.mkdir(parents=True, exist_ok=True)
        self._put_aside(redo)
        for step in self.plan.steps:
            self._refuse_changes(step)
        for step in self.plan.steps:
            self._train(step)
            for measure in self.plan.measures_after(step.name):
                self._take(measure, step)
            self._judge(step)

    # --- one stage ------------------------------------------------------------------------------------------------------

    def _train(self, step: Step) -> None:
        entry = self.state["stages"].get(step.name)
        sources = {role: self._standing(source) for role, source in step.sources.items()}
        now = self._identity(step)
        if entry and entry["identity"] != now:      # its configuration is the same (_refuse_changes), so its parents are not
            raise RecipeStopped(f"{step.name} was started from {_told(entry['parents'])}, but the recipe and its gates now ask for {_told(sources)}, "
                                f"or that was trained anew; train it again with --redo {step.name}, or change them back")
        if entry and entry["status"] == "done":
            return
        if entry is None and find(step.result):
            raise RecipeStopped(f"{step.folder} holds a run that {self.path} does not know, so what it was trained on is not known either; "
                                f"move it away, or let --redo {step.name} put it aside")
        folders = {role: self._checkpoint(source) for role, source in sources.items()}
        entry = entry or {"identity": now, "essence": step.essence, "parents": sources, "seconds": 0.0, "began": _now()}
        self._remember(step.name, {**entry, "status": "started"})
        resumed = find(step.result)
        self.say(f"== {step.name} ({step.kind}): {self._steps(step)} steps on {step.ranks} rank{'s' * (step.ranks > 1)}"
                 + (f", from {_told(sources)}" if sources else "") + (f", resuming {resumed}" if resumed else ""))
        job = self._job(step.name, step.script, step.wired(folders), step.ranks, step.torchrun, step.folder, step.folders, self._steps(step))
        started = time.monotonic()
        try:
            code = self.launch(job)
        finally:
            entry = {**entry, "seconds": entry["seconds"] + time.monotonic() - started}
            self._remember(step.name, {**entry, "status": "started"})
        if code:
            raise RecipeStopped(f"{step.name} failed (exit code {code}); the same command resumes it. The end of {job.output}:\n{tail(job.output)}")
        self._finish(step, entry, folders)

    def _finish(self, step: Step, entry: dict[str, Any], folders: dict[str, Path]) -> None:
        found = find(step.result)
        if found is None:
            raise RecipeStopped(f"{step.name} ended without a checkpoint in {step.result}; " + (
                "its time (train.max_minutes) was over before the last rung, and the same command goes on"
                if step.kind == "long_context" and step.run.train.max_minutes else "set checkpoint.save_at_end"))
        position = dict(loaded.position(found))
        planned = schedule.planned_steps(step.runs[-1].train)
        if position["step"] < planned:
            train = step.run.train
            reasons = " or ".join(name for name, is_set in (("max_minutes", train.max_minutes), ("stop_when", train.stop_when.metric)) if is_set)
            if not reasons:
                raise RecipeStopped(f"{step.name} ended at step {position['step']} of {planned} by its last checkpoint; set checkpoint.save_at_end")
            self.say(f"   {step.name} ended by train.{reasons} at step {position['step']} of {planned}")
        parent = self.plan.step(entry["parents"]["load"]) if "load" in entry["parents"] else None
        spike = self.plan.recipe.spike
        boundary = outcome.boundary(step, parent, spike)
        numbers = outcome.numbers_of(step) | {f"boundary/{key}": float(value) for key, value in boundary.items() if key != "set"}
        sentences = outcome.spike_sentences(step.name, boundary, spike)
        entry = {**entry, "status": "done", "ended": _now(), "position": position, "numbers": numbers, "boundary": boundary, "spikes": sentences,
                 "measured": {}, "verdicts": []}
        write_json(lineage.path_of(step.result), lineage.describe(step, self.plan.path, entry, folders))
        self._remember(step.name, entry)
        shown = [f"{name} {numbers[f'{name}/valid_loss']:.4f}" for name in step.sets if f"{name}/valid_loss" in numbers]
        self.say(f"   {step.name} done in {clock(entry['seconds'])}" + (f"; validation loss: {', '.join(shown)}" if shown else ""))
        for sentence in sentences:
            self.say(f"   {sentence}")

    def _take(self, measure: Measure, step: Step) -> None:
        """One measure of a finished stage, unless it was taken under the same settings."""
        entry = self.state["stages"][step.name]
        now, old = identity(measure.essence), entry["measured"].get(measure.name)
        if old and old["identity"] == now:
            return
        folder = step.folder / "measures" / measure.name
        shutil.rmtree(folder, ignore_errors=True)      # lines of an earlier attempt; its numbers are in state.json or never were
        title, config = f"{measure.name} of {step.name}", measure.wired(folder, self._checkpoint(step.name))
        job = self._job(title, measure.script, config, measure.ranks, self.plan.recipe.torchrun, folder, [folder], 0)
        code = self.launch(job)
        if code:
            raise RecipeStopped(f"the measure {title} failed (exit code {code}). The end of {job.output}:\n{tail(job.output)}")
        numbers = outcome.measured_numbers(measure, folder)
        missing = [name for name in measure.entry.metrics if name not in numbers]
        if missing:
            raise RecipeStopped(f"the measure {measure.name} shows {', '.join(missing)}, but its run gave {', '.join(numbers) or 'no numbers'}; "
                                f"change measures.{measure.name}.metrics")
        self._remember(step.name, {**entry, "measured": {**entry["measured"], measure.name: {"identity": now, "numbers": numbers}}})
        self.say(f"   {title}: " + ", ".join(f"{name} {numbers[name]:.4g}" for name in measure.entry.metrics))

    def _job(self, title: str, script: str, config: dict, ranks: int, torchrun: list[str], folder: Path, folders: list[Path], steps: int) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config), folder / "stage.yaml")
        return Job(title, script, folder / "stage.yaml", ranks, torchrun, folder / "output.log", folders, steps)

    def _steps(self, step: Step) -> int:
        return sum(schedule.planned_steps(run.train) for run in step.runs)

    # --- gates ----------------------------------------------------------------------------------------------------------

    def _judge(self, step: Step) -> None:
        """Every gate of a stage. Raises RecipeStopped where one is shut and asks for that."""
        entry, verdicts = self.state["stages"][step.name], []
        for gate in step.entry.gates:
            try:
                verdicts.append(outcome.judge(gate, step.name, self._numbers, gate.rollback_to or step.start))
            except outcome.GateError as error:
                raise RecipeStopped(f"{step.name}: {error}") from None
        shut = [verdict for verdict in verdicts if not verdict.passed]
        records = [verdict.record() for verdict in verdicts]
        if records != entry["verdicts"]:
            for verdict in verdicts:
                self.say(f"   gate {'open' if verdict.passed else 'SHUT'}: {verdict}")
            entry = {**entry, "verdicts": records}
            path = lineage.path_of(step.result)
            if path and path.is_file():
                write_json(path, {**json.loads(path.read_text()), "gates": records})
            self._remember(step.name, entry)
        if any(verdict.on_failure == "stop" for verdict in shut):
            raise RecipeStopped(f"{step.name}: " + "; ".join(f"gate shut: {verdict}" for verdict in shut if verdict.on_failure == "stop")
                                + f". Its checkpoint is kept in {step.result}. Change the stage and --redo {step.name}, "
                                "change the gate, or its on_failure")
        backwards = [verdict for verdict in shut if verdict.on_failure == "rollback"]
        if backwards:
            target = self._standing(backwards[0].rollback_to)
            self.stands_for[step.name] = target
            self.say(f"   rolled back: later stages take {target} in place of {step.name}, because {'; '.join(map(str, backwards))}")

    def _numbers(self, name: str) -> dict[str, float]:
        return all_numbers(self.state["stages"].get(name, {}))

    # --- what stands for what, and what is remembered ----------------------------------------------------------------------

    def _standing(self, name: str) -> str:
        return self.stands_for.get(name, name)

    def _checkpoint(self, name: str) -> Path:
        folder = self.plan.step(name).result
        if find(folder) is None:
            raise RecipeStopped(f"{name} is done by {self.path}, but its checkpoint in {folder} is gone; train it again with --redo {name}")
        return folder

    def _identity(self, step: Step) -> str:
        """Of the configuration and the parents, each with its own."""
        parents = {role: self.state["stages"].get(self._standing(source), {}).get("identity", "") for role, source in step.sources.items()}
        return identity(step.kind, step.essence, parents)

    def _refuse_changes(self, step: Step) -> None:
        """Refuse, before anything starts, a stage whose configuration is not the one it was started with."""
        entry = self.state["stages"].get(step.name)
        if entry is None or entry["essence"] == json.loads(json.dumps(step.essence, default=str)):
            return
        changes = differences(entry["essence"], json.loads(json.dumps(step.essence, default=str)))
        redone = [step.name, *(name for name in self.plan.descendants(step.name) if name in self.state["stages"])]
        raise RecipeStopped(f"{step.name} is {entry['status']} with another configuration:\n" + "\n".join(f"  - {change}" for change in changes)
                            + f"\nChange it back, or train {', '.join(redone)} again with --redo {step.name}, which puts aside what is there")

    def _put_aside(self, names: list[str]) -> None:
        """Rename the folders of these stages and of all that depend on them, and forget them. Goes on where an earlier start was killed in it."""
        moving = self.state.get("moving", {})
        for name in [name for first in names for name in (first, *self.plan.descendants(first))]:
            if name not in moving and (name in self.state["stages"] or (self.plan.dir / name).exists()):
                moving = {**moving, name: str(_free(self.plan.dir / name))}
        if not moving:
            return
        self._save({**self.state, "moving": moving})
        for name, target in moving.items():
            if (self.plan.dir / name).exists():
                (self.plan.dir / name).rename(target)
                self.say(f"put aside {self.plan.dir / name} as {target}")
        stages = {name: entry for name, entry in self.state["stages"].items() if name not in moving}
        self._save({"stages": stages})

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        self._save({**self.state, "stages": {**self.state["stages"], name: entry}})

    def _save(self, state: dict[str, Any]) -> None:
        self.state = state
        write_json(self.path, state)


def read_state(plan: Plan) -> dict[str, Any]:
    """What state.json holds; nothing for a recipe that has not started. Raises RecipeStopped for a file that cannot be read."""
    path = plan.dir / "state.json"
    if not path.is_file():
        return {"stages": {}}
    try:
        state = json.loads(path.read_text())
        assert isinstance(state["stages"], dict)
        return state
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise RecipeStopped(f"{path} is damaged ({type(error).__name__}: {error}); restore it, or move {plan.dir} away and start anew") from None


def all_numbers(entry: dict[str, Any]) -> dict[str, float]:
    """Everything known after a stage, as set/metric and measure/metric. entry: of state.json."""
    measured = {f"{name}/{key}": value for name, found in entry.get("measured", {}).items() for key, value in found["numbers"].items()}
    return {**entry.get("numbers", {}), **measured}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`train.steps: 100 -> 200` for each dotted key that is not the same."""
    return [f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def tail(path: Path) -> str:
    """The lines of a failed stage's output that say why: from the last message of the engine on, or the last lines."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines = lines[max((i for i, line in enumerate(lines) if line.startswith("== ")), default=-1) + 1:]
    told = [i for i, line in enumerate(lines) if line.startswith("error: ") or "in the configuration" in line]
    if told:      # what follows is torchrun's report on which process ended first
        lines = list(itertools.takewhile(lambda line: not re.match(r"[WE]\d{4} ", line), lines[told[-1]:]))
    return "\n".join(lines[:NUM_LINES] if told else lines[-NUM_LINES:])


def _told(sources: dict[str, str]) -> str:
    return ", ".join(name if role == "load" else f"{role} {name}" for role, name in sources.items()) or "nothing"


def _free(path: Path) -> Path:
    return next(candidate for n in range(1, 10**6) if not (candidate := path.with_name(f"{path.name}.aside-{n}")).exists())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
