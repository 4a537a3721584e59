"""The search: every legal layout with its memory and its time, the best first, and why the others were refused.

    base, own, pins = read(path, overrides)                # a configuration, whose layout is the question
    answer = search(base, cluster, pins)                   # Answer: plans, refused, misses
    judge(run, cluster)                                    # Plan of one layout, fitting or not

Of one layout the least recomputation that fits is kept, since more of it only costs time; larger micro-batches than one that does not fit are passed over.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import ValidationError

from engine import metrics, torch_only
from engine.checks import cross_checks
from engine.config import ConfigError, Parallel, RunConfig, read_yaml, validate
from engine.planner.cluster import Cluster
from engine.planner.constants import GIB
from engine.planner.layouts import AXES, RECOMPUTE, Layout, layouts, placed
from engine.planner.memory import Memory, fullest, memory_of
from engine.planner.time import OURS, Dispatch, StepTime, step_time, tflops
from engine.planner.weights import least
from engine.stages import STAGES, TEXT, ladder

PLANNED = (*TEXT, "sft", "reward")
OF_TRAIN = ("micro_batch", "recompute")      # fields of train that belong to a layout
SWITCHED = (*AXES, "overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap")      # those of parallel


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs. memory: of the fullest rank, pp_rank its place in the pipeline."""

    run: RunConfig
    cluster: Cluster
    memory: Memory
    pp_rank: int
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.gpu.memory_gib * GIB

    @property
    def dp(self) -> int:
        p = self.run.parallel
        return self.cluster.num_gpus // (p.tp * p.pp * p.cp)

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.run.train.global_batch * self.run.train.seq_len / self.time.total / self.cluster.num_gpus

    @property
    def tflops(self) -> float:
        """Model TFLOP/s per GPU."""
        return tflops(self.run, self.cluster, self.time.total)

    @property
    def mfu(self) -> float:
        """Against the bf16 peak, or FP8's where matrix products are FP8."""
        gpu, is_fp8 = self.cluster.gpu, self.run.train.fp8.recipe != "none"
        return self.tflops / (gpu.fp8_tflops if is_fp8 else gpu.tflops)

    @property
    def causal_share(self) -> float:
        """FLOPs with the half of attention that the mask leaves, as a share of Megatron's, which tflops and mfu count by."""
        full, half = (metrics.flops_per_token(self.run.model, self.run.train.seq_len, causal) for causal in (False, True))
        return half / full


@dataclass
class Refusals:
    """Layouts refused for one reason. example: the first of them, in the words of the checks."""

    count: int = 0
    example: str = ""


@dataclass
class Answer:
    plans: list[Plan] = field(default_factory=list)
    refused: dict[str, Refusals] = field(default_factory=dict)
    misses: list[tuple[int, RunConfig]] = field(default_factory=list)      # (bytes needed, layout) where no micro-batch fits, the nearest first

    @property
    def num_refused(self) -> int:
        return sum(group.count for group in self.refused.values())


def backend_of(run) -> str:
    """Which layers a GPU would run: engine/mcore/build.py's rule, given that Transformer Engine is there."""
    return "torch" if run.train.backend == "torch" or run.lora.rank or torch_only.reasons(run.model) else "te"


def judge(run: RunConfig, cluster: Cluster, backend: str = "", dispatch: Dispatch = OURS) -> Plan:
    """What a layout needs. backend, dispatch: others than the engine would choose."""
    backend = backend or backend_of(run)
    _check_fp8(run, cluster)
    pp_rank, memory = fullest(memory_of(run, cluster.num_gpus, backend))
    return Plan(run, cluster, memory, pp_rank, step_time(run, cluster, backend, dispatch))


def search(base: RunConfig, cluster: Cluster, pins: dict) -> Answer:
    """Every layout of `base` on the cluster. pins: see layouts.layouts; recompute may be among them."""
    _check_fp8(base, cluster)
    answer, backend, room, missed = Answer(), backend_of(base), cluster.gpu.memory_gib * GIB, None
    for layout in layouts(base, cluster, pins, backend):
        if layout.problems:
            _refuse(answer, layout)
            continue
        if layout.run.parallel == missed:
            continue      # a smaller micro-batch did not fit
        need, run = least(layout.run, cluster.num_gpus), layout.run
        if need <= room:
            need, run = _least_recomputation(layout.run, cluster, backend, pins)
        if need <= room:
            answer.plans.append(judge(run, cluster, backend))
        else:
            missed = layout.run.parallel
            answer.misses.append((need, run))
    answer.plans.sort(key=lambda plan: (plan.time.total, plan.memory.total))
    answer.misses.sort(key=lambda need: need[0])
    if not answer.plans:      # the nearest of what was put aside by its weights alone
        nearest = [_least_recomputation(run, cluster, backend, pins) for _, run in answer.misses[:50]]
        answer.misses = sorted([*nearest, *answer.misses[50:]], key=lambda need: need[0])
    return answer


def with_fp8(base: RunConfig, cluster: Cluster) -> RunConfig:
    """The same run with FP8 matrix products, by the recipe that suits the GPU. Raises ConfigError where the checks or the GPU refuse them."""
    recipe = "mxfp8" if cluster.gpu.name.startswith("B") else "tensorwise"
    run = placed(base, {"fp8": base.train.fp8.model_copy(update={"recipe": recipe})})
    _check_fp8(run, cluster)
    if backend_of(run) != "te":
        raise ConfigError([f"--fp8 needs Transformer Engine's layers, but this configuration runs on torch's ({_why_torch(run)})"])
    if problems := cross_checks(run, None):
        raise ConfigError(problems)
    return run


def _why_torch(run) -> str:
    return ", ".join(torch_only.reasons(run.model)) or ("adapters" if run.lora.rank else "train.backend=torch")


def merged(one: Answer, other: Answer) -> Answer:
    """Both, the best first; refusals of layouts are those of the first."""
    plans = sorted(one.plans + other.plans, key=lambda plan: (plan.time.total, plan.memory.total))
    return Answer(plans, one.refused, sorted(one.misses + other.misses, key=lambda need: need[0]))


def _least_recomputation(run: RunConfig, cluster: Cluster, backend: str, pins: dict) -> tuple[int, RunConfig]:
    """(bytes, run) with the least recomputation that fits, or what needs the least memory."""
    needs = []
    for recompute in [pins["recompute"]] if "recompute" in pins else RECOMPUTE:
        tried = placed(run, {"recompute": recompute})
        needs.append((fullest(memory_of(tried, cluster.num_gpus, backend))[1].total, tried))
        if needs[-1][0] <= cluster.gpu.memory_gib * GIB:
            return needs[-1]
    return min(needs, key=lambda need: need[0])


def _check_fp8(run: RunConfig, cluster: Cluster) -> None:
    if run.train.fp8.recipe != "none" and not cluster.gpu.fp8_tflops:
        raise ConfigError([f"train.fp8.recipe={run.train.fp8.recipe}, but {cluster.gpu.name} has no FP8; set it to none, or choose another --gpu"])


def _refuse(answer: Answer, layout: Layout) -> None:
    group = answer.refused.setdefault(layout.reason, Refusals(example=layout.problems[0]))
    group.count += 1


def read(path: str, overrides: list[str]) -> tuple[RunConfig, dict, dict]:
    """(the run without a layout, its raw keys, the axes and fields that overrides fix). The layout of the file itself is in the raw keys.

    Raises ConfigError for what is wrong whatever the layout, and for stages that are not planned.
    """
    raw = read_yaml(Path(path), overrides)
    parallel, train = (raw.get(name) if isinstance(raw.get(name), dict) else {} for name in ("parallel", "train"))
    _check_fields(parallel)
    named = {override.split("=", 1)[0] for override in overrides}
    pins = {axis: parallel[axis] for axis in AXES if f"parallel.{axis}" in named}
    pins |= {name: train[name] for name in OF_TRAIN if f"train.{name}" in named}
    others = {name: value for name, value in parallel.items() if name not in SWITCHED}
    bare = {**raw, "parallel": {**others, "zero1": True}}
    if isinstance(raw.get("train"), dict):
        bare["train"] = {**train, **{name: value for name, value in (("micro_batch", 1), ("recompute", "none")) if name not in pins}}
    run = validate(bare)
    if run.stage in STAGES and run.stage not in PLANNED:
        raise ConfigError([f"stage={run.stage} trains beside other networks, which the planner does not count; it plans {', '.join(PLANNED)}"])
    return for_planning(run, parallel.get("tp_comm_overlap", False)), raw, pins


def _check_fields(parallel: dict) -> None:
    """Each field of the layout by itself; what they decide together is the search's."""
    try:
        Parallel.model_validate({name: value for name, value in parallel.items() if name in SWITCHED})
    except ValidationError as error:
        raise ConfigError([f"parallel.{'.'.join(map(str, mistake['loc']))}={mistake['input']!r}: {mistake['msg']}" for mistake in error.errors()]) from None


def for_planning(run: RunConfig, tp_comm_overlap: bool = False) -> RunConfig:
    """The run as a GPU would see it at its largest: a reward model's head, the last rung of a ladder, no device but a GPU."""
    if run.stage == "long_context":
        run = ladder.rungs(run)[-1]
    update = {"run": run.run.model_copy(update={"device": "auto"}), "parallel": run.parallel.model_copy(update={"tp_comm_overlap": bool(tp_comm_overlap)})}
    if run.stage == "reward":
        update["model"] = run.model.model_copy(update={"head": "scalar"})
    return run.model_copy(update=update)


def own_layout(raw: dict, cluster: Cluster) -> tuple[Plan | None, list[str]]:
    """The layout that the file itself has: judged, or what is wrong with it on this many GPUs."""
    try:
        run = validate(raw, cluster.num_gpus)
    except ConfigError as error:
        return None, error.problems
    return judge(for_planning(run, run.parallel.tp_comm_overlap), cluster), []


def write(raw: dict, plan: Plan, path: str) -> None:
    """The user's keys with this layout in place of theirs, as YAML; device cpu becomes auto. Comments are lost."""
    if raw.get("long_context", {}).get("ladder"):
        raise ConfigError([f"--write: the rungs of long_context.ladder have micro-batches of their own; set the last one's to {plan.run.train.micro_batch}, "
                           "train.recompute and parallel.* by hand"])
    train, run = plan.run.train, dict(raw["run"])
    if run.get("device") == "cpu":
        run["device"] = "auto"
    parallel = {**raw.get("parallel", {}), **{name: value for name, value in plan.run.parallel.model_dump().items() if name in SWITCHED}}
    fields = {"micro_batch": train.micro_batch, "recompute": train.recompute}
    if train.fp8.recipe != "none":
        fields["fp8"] = {**raw["train"].get("fp8", {}), "recipe": train.fp8.recipe}
    chosen = {**raw, "run": run, "parallel": parallel, "train": {**raw["train"], **fields}}
    validate(chosen, plan.cluster.num_gpus)      # what is written is what the training command would accept
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(chosen)))
