"""From a recipe to its plan: every stage and measure with a validated configuration, before any process is started.

    plan = make_plan("recipe.yaml", overrides)        # ConfigError with every mistake of every stage
    plan.steps[1].wired({"base": Path("runs/base")})  # the nested dict that its launcher gets

A stage without a model section takes that of the stage it starts from, as the engine takes that of checkpoint.load; here it is known before
that checkpoint exists. Left out: anything read from data (lengths, tokenizers), which the stages check when they start.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import metrics, schedule
from engine.config import ConfigError, RunConfig, nearest, validate
from engine.config import read_yaml
from engine.recipe import scaling
from engine.recipe.sections import CHINCHILLA, NOTHING, Gate, MeasureEntry, Recipe, StageEntry, load_recipe
from engine.stages import ALIGN, TEXT, ladder

SCALAR_STAGES = ("reward",)      # what they save gives one number per token and cannot stand where a language model is loaded
# What changes how a run is computed, or where it is kept, but not what comes out of it; a finished stage is still the same under others.
NEUTRAL = ("parallel", "log", "run.dir", "run.device", "run.timeout_minutes", "train.micro_batch", "train.recompute", "train.compile",
           "train.manual_gc", "data.prefetch", "data.threads", "data.buffer", "data.read_on", "data.feed",
           "data.cache_dir", "chat.workers", "checkpoint.save_every")
MANY_STEPS = 10**9               # stands for train.steps while the model is read that decides them


@dataclass(frozen=True)
class Step:
    """One stage of the plan. keys: its configuration before the recipe fills in folders; run: the same, validated."""

    name: str
    entry: StageEntry
    keys: dict[str, Any]
    run: RunConfig
    ranks: int
    torchrun: list[str]
    start: str
    """Stage whose checkpoint it loads; empty for none."""
    folder: Path

    @property
    def kind(self) -> str:
        return self.run.stage

    @property
    def script(self) -> str:
        return "align.py" if self.kind in ALIGN else "pretrain.py"

    @property
    def head(self) -> str:
        return "scalar" if self.kind in SCALAR_STAGES else "tokens"

    @property
    def runs(self) -> list[RunConfig]:
        """The runs of the engine that it consists of: itself, or the rungs of a ladder."""
        return ladder.rungs(self.run) if self.kind == "long_context" and self.run.long_context.ladder else [self.run]

    @property
    def folders(self) -> list[Path]:
        return [Path(run.run.dir) for run in self.runs]

    @property
    def result(self) -> Path:
        """The run folder whose checkpoint is what the stage leaves."""
        return self.folders[-1]

    @property
    def sources(self) -> dict[str, str]:
        """Stages it reads checkpoints of, by what they become: load, or the name of a role."""
        return {**({"load": self.start} if self.start else {}), **self.entry.roles}

    @property
    def sets(self) -> list[str]:
        """Names under which metrics.jsonl of its run holds lines beside the training lines."""
        run = self.run
        named = list(run.data.valid) or (["valid"] if run.data.split else [])
        averages = [f"{name}/average" for name in named] if run.average.kind != "none" else []
        return [*(named + averages if run.train.eval_samples else []), run.stage]

    def wired(self, sources: Mapping[str, Path]) -> dict[str, Any]:
        """The configuration that its launcher gets. sources: folders by load and role names, as in self.sources."""
        loads = {name: str(path) for name, path in sources.items() if name != "load"}
        changes = {"run": {"dir": str(self.folder)}}
        if sources:
            changes["checkpoint"] = {**({"load": str(sources["load"])} if "load" in sources else {}), **({"roles": loads} if loads else {})}
        return laid_over(self.keys, changes)

    @property
    def essence(self) -> dict[str, Any]:
        """What decides the outcome of the stage, beside the checkpoints it reads."""
        return essence_of(self.keys)


@dataclass(frozen=True)
class Measure:
    """One evaluation. after: the stages it is taken after."""

    name: str
    entry: MeasureEntry
    keys: dict[str, Any]
    run: RunConfig
    set: str
    ranks: int
    after: list[str]

    @property
    def script(self) -> str:
        return "align.py" if self.run.stage in ALIGN else "pretrain.py"

    def wired(self, folder: Path, checkpoint: Path | str) -> dict[str, Any]:
        return _measuring(self.keys, folder, checkpoint)

    @property
    def essence(self) -> dict[str, Any]:
        return essence_of(_measuring(self.keys, Path(), ""))


@dataclass(frozen=True)
class Plan:
    """A recipe that could start: its stages in order, and its measures."""

    path: Path
    recipe: Recipe
    steps: list[Step] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)

    @property
    def dir(self) -> Path:
        return Path(self.recipe.dir)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def measures_after(self, name: str) -> list[Measure]:
        return [measure for measure in self.measures if name in measure.after]

    def descendants(self, name: str) -> list[str]:
        """The stages that depend on this one, directly or through others, in order."""
        found = []
        for step in self.steps:
            if {name, *found} & set(step.sources.values()):
                found.append(step.name)
        return found


def make_plan(path: str | Path, overrides: list[str] = ()) -> Plan:
    """Read a recipe and the configurations it names. Raises ConfigError with every mistake of every stage."""
    path = Path(path)
    recipe = load_recipe(path, overrides)
    plan, problems = Plan(path, recipe), []
    for name, entry in recipe.stages.items():
        try:
            plan.steps.append(_step(plan, name, entry))
        except ConfigError as error:
            problems += [f"stages.{name}: {problem}" for problem in error.problems]
        except _Unjudged:
            continue
    is_whole = len(plan.steps) == len(recipe.stages)
    for name, entry in recipe.measures.items() if is_whole else ():
        try:
            plan.measures.append(_measure(plan, name, entry))
        except ConfigError as error:
            problems += [f"measures.{name}: {problem}" for problem in error.problems]
    if is_whole:
        problems += [f"stages.{step.name}.gates.{i}: {problem}" for step in plan.steps for i, gate in enumerate(step.entry.gates)
                     for problem in _gate_problems(plan, step, gate)]
    if problems:
        raise ConfigError(problems)
    return plan


def laid_over(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """raw with nested changes laid over it; lists and values are replaced, sections are merged."""
    merged = copy.deepcopy(raw)
    for key, value in changes.items():
        merged[key] = laid_over(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else copy.deepcopy(value)
    return merged


def dotted(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {"train.steps": 10}."""
    flat = {}
    for key, value in raw.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def essence_of(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a configuration without those that decide nothing about the result."""
    return {key: value for key, value in sorted(dotted(keys).items()) if not any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)}


def identity(*parts) -> str:
    """sha256 of anything that JSON can hold, key order aside."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# --- one stage --------------------------------------------------------------------------------------------------------


class _Unjudged(Exception):
    """A stage whose model is not known, because a stage that it starts from was refused."""


def _step(plan: Plan, name: str, entry: StageEntry) -> Step:
    recipe, names = plan.recipe, list(plan.recipe.stages)
    keys = _keys(plan.path, entry)
    kind = str(keys.get("stage", "pretrain"))
    earlier, before = names[:names.index(name)], {step.name: step for step in plan.steps}
    start = _start(kind, entry, earlier, keys)
    problems = _source_problems(kind, entry, start, earlier, before, names)
    if problems:
        raise ConfigError(problems)
    if {start, *entry.roles.values()} - {"", *before}:
        raise _Unjudged
    parent = before.get(start)
    ranks, folder = entry.ranks or recipe.ranks, plan.dir / name
    draft = Step(name, entry, keys, None, ranks, entry.torchrun or recipe.torchrun, start, folder)
    sources = {role: before[source].result for role, source in draft.sources.items()}
    if entry.tokens:
        keys = laid_over(keys, {"train": {"steps": _steps_for(draft, _with_model(draft.wired(sources), parent), ranks)}})
        draft = replace(draft, keys=keys)
    run = validate(_with_model(draft.wired(sources), parent), ranks)
    return replace(draft, run=run)


def _keys(path: Path, entry: StageEntry | MeasureEntry) -> dict[str, Any]:
    """The configuration of an entry: its file, found beside the recipe, with its own keys laid over it."""
    if not entry.config and not entry.keys:
        raise ConfigError(["it has no configuration; name a file beside the recipe in config, or give keys"])
    return laid_over(read_yaml(path.parent / entry.config, []) if entry.config else {}, entry.keys)


def _start(kind: str, entry: StageEntry, before: list[str], keys: dict[str, Any]) -> str:
    own = (keys.get("checkpoint") or {}).get("load")
    if entry.start == NOTHING:
        return ""
    if entry.start and own:
        raise ConfigError([f"it starts from {entry.start}, but its configuration sets checkpoint.load={own}; remove one of them"])
    if entry.start:
        return entry.start
    if own and before:
        raise ConfigError([f"its configuration sets checkpoint.load={own}; say from: {NOTHING} to load that, "
                           f"or remove it to start from {before[-1]}"])
    return before[-1] if before and kind != "pretrain" else ""


def _source_problems(kind: str, entry: StageEntry, start: str, earlier: list[str], before: dict[str, Step], names: list[str]) -> list[str]:
    problems = []
    for key, source in {**({"from": start} if start else {}), **{f"roles.{role}": source for role, source in entry.roles.items()}}.items():
        if source not in names:
            problems.append(f"{key}={source} is no stage of this recipe{nearest(source, earlier or [NOTHING])}")
        elif source not in earlier:
            problems.append(f"{key}={source} does not run before it; a stage reads checkpoints of stages before it")
    if start in before and before[start].head == "scalar" and kind not in SCALAR_STAGES:
        problems.append(f"it would start from {start}, a reward model, which says no tokens; write from: NAME with a stage before that")
    return problems


def _with_model(raw: dict[str, Any], parent: Step | None) -> dict[str, Any]:
    """raw with the model that the engine will find in the parent's checkpoint, unless it has one of its own."""
    own = raw.get("model") or {}
    if parent is None or not isinstance(own, dict) or own.get("family") is not None:
        return raw
    written = parent.runs[-1].model.model_dump()
    written.pop("head")      # the stage's business
    return {**raw, "model": laid_over(written, own)}


def _steps_for(step: Step, raw: dict[str, Any], ranks: int) -> int:
    """train.steps that reach entry.tokens."""
    if isinstance(raw.get("train"), dict):
        raw = laid_over(raw, {"train": {"steps": MANY_STEPS}})
    run, entry = validate(raw, ranks), step.entry
    if run.stage == "long_context" and run.long_context.ladder:
        raise ConfigError(["tokens sets train.steps, but the rungs of long_context.ladder have tokens of their own; remove it"])
    tokens = entry.tokens
    if tokens == CHINCHILLA:
        parameters = metrics.num_parameters(run.model, run.train.seq_len).total
        tokens = scaling.read(entry.law).best_tokens(parameters) if entry.law else parameters * entry.tokens_per_parameter
    last_sample = -(-int(tokens) // run.train.seq_len) - 1
    return schedule.step_of_sample(last_sample, run.train)


# --- measures and gates -----------------------------------------------------------------------------------------------


def _measure(plan: Plan, name: str, entry: MeasureEntry) -> Measure:
    keys = _keys(plan.path, entry)
    keys.pop("model", None)      # the network is the checkpoint's
    ranks = entry.ranks or plan.recipe.ranks
    unknown = [f"after names {stage}, which is no stage of this recipe{nearest(stage, plan.recipe.stages)}"
               for stage in entry.after if stage not in plan.recipe.stages]
    if unknown:
        raise ConfigError(unknown)
    head = "scalar" if keys.get("stage") in SCALAR_STAGES else "tokens"
    wrong = [stage for stage in entry.after if plan.step(stage).head != head]
    if wrong:
        lacking = "rewards" if head == "scalar" else "probabilities"
        raise ConfigError([f"after names {', '.join(wrong)}, whose network has no {lacking}; leave it out"])
    after = [step for step in plan.steps if step.head == head and (not entry.after or step.name in entry.after)]
    if not after:
        raise ConfigError(["no stage of this recipe has a network that it could measure"])
    runs, problems = [], []
    for step in {step.runs[-1].model.model_dump_json(): step for step in after}.values():      # once per model
        try:
            runs.append(validate(_with_model(_measuring(keys, plan.dir / step.name, step.result), step), ranks))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    sets = list(runs[0].data.valid) or (["valid"] if runs[0].data.split else [])
    if not runs[0].train.eval_samples:
        raise ConfigError(["train.eval_samples is 0, so it would measure nothing; set how many samples it reads"])
    if entry.set and entry.set not in sets:
        raise ConfigError([f"set={entry.set} is no validation set of its configuration{nearest(entry.set, sets)}"])
    if not entry.set and len(sets) > 1:
        raise ConfigError([f"its configuration has the validation sets {', '.join(sets)}; say which one in set"])
    return Measure(name, entry, keys, runs[0], entry.set or sets[0], ranks, [step.name for step in after])


def _measuring(keys: dict[str, Any], folder: Path, checkpoint: Path | str) -> dict[str, Any]:
    """The configuration that validates a checkpoint and changes nothing."""
    load = {"load": str(checkpoint), "load_optimizer": False, "roles": {}}
    return laid_over(keys, {"run": {"dir": str(folder)}, "checkpoint": load, "train": {"steps": 0}})


def _gate_problems(plan: Plan, step: Step, gate: Gate):
    """What can be known to be wrong with a gate before its stage has run, one sentence each."""
    limits = [name for name in ("at_least", "at_most", "at_least_of", "at_most_of") if getattr(gate, name) not in (None, "")]
    if len(limits) != 1:
        yield f"it has {' and '.join(limits) or 'no limit'}; give one of at_least, at_most, at_least_of, at_most_of"
    if bool(gate.set) == bool(gate.measure):
        yield "say where its metric is found: either set (of the stage's own run) or measure (of the recipe)"
    if (gate.times, gate.plus, gate.minus) != (1.0, 0.0, 0.0) and not (gate.at_least_of or gate.at_most_of):
        yield "times, plus and minus change the number of another stage; give at_least_of or at_most_of, or remove them"
    before = [earlier.name for earlier in plan.steps[:plan.steps.index(step)]]
    other = gate.at_least_of or gate.at_most_of
    if other and other not in before:
        yield f"{limits[-1]}={other} is no stage before this one{nearest(other, before) if before else ''}"
    for name in (step.name, *([other] if other in before else [])):
        yield from _place_problems(plan, plan.step(name), gate)
    if gate.rollback_to and gate.on_failure != "rollback":
        yield f"rollback_to={gate.rollback_to} is read with on_failure: rollback, but it is {gate.on_failure}"
    if gate.on_failure == "rollback":
        target = gate.rollback_to or step.start
        if not target:
            yield "on_failure: rollback needs an earlier checkpoint, but this stage starts from nothing; name rollback_to, or stop"
        elif target not in before:
            yield f"rollback_to={target} is no stage before this one{nearest(target, before) if before else ''}"
        elif plan.step(target).head != step.head:
            yield f"rollback_to={target} has another kind of network than {step.name} ({plan.step(target).kind}, {step.kind}); stop instead"


def _place_problems(plan: Plan, step: Step, gate: Gate):
    measures = {measure.name: measure for measure in plan.measures}
    if gate.measure and gate.measure not in measures:
        yield f"measure={gate.measure} is no measure of this recipe{nearest(gate.measure, measures) if measures else ''}"
    elif gate.measure and step.name not in measures[gate.measure].after:
        yield f"measure={gate.measure} is not taken after {step.name}; it is after {', '.join(measures[gate.measure].after)}"
    sets = ["train", "boundary", *step.sets]
    if gate.set and gate.set not in sets and step.kind in TEXT | ALIGN:
        yield f"set={gate.set} is no validation set of {step.name}{nearest(gate.set, sets)}"
