"""READ FIRST: the one loop. Build, load, then for each global batch: prepare, train, log, validate, save.

    code = train(run)        # on every rank; run is a RunConfig from engine/config.py

Everything below is the same for every stage and every layout: a stage (engine/stages/) says what the data and the loss are,
engine/mcore/ spreads a network over ranks, engine/data/ turns a sample number into tensors. The state of a run is its
networks and one Position. Left out on purpose: branches for features; they live in a stage, the log or a helper below.
"""

import gc
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine import metrics, schedule
from engine.data.loader import Loader, Prefetcher
from engine.log import RunLog
from engine.mcore import build, checkpoint, observe, topology
from engine.mcore.average import Average
from engine.mcore.checkpoint import Position
from engine.mcore.run import NonFiniteGradient, ParallelModel
from engine.stage import Role
from engine.stages import build_stage


def train(run) -> Position:
    """Train one stage to its end on every rank of the process group. Returns where it stopped.

    Raises ValueError (ConfigError, DataError, CheckpointError, TrainingStopped among them) for what a person must mend.
    """
    stage = build_stage(run.stage)
    run = stage.configure(run)
    place = topology.start(run)
    position = Position()
    for part in stage.runs(run, Trainer(run, stage, place)):  # one, but for stages that are a ladder of runs
        log = RunLog(part, place.rank, place.world_size, place.dp)
        try:
            position = Trainer(part, stage, place, log).train()
            log.close("done")
        except BaseException as error:
            log.close("failed", str(error) or type(error).__name__)
            raise
    return position


class Trainer:
    """The parts of one run on this rank. A stage may ask it for a `loader` and for a `frozen` network."""

    def __init__(self, run, stage, place, log=None):
        self.run, self.stage, self.place, self.log = run, stage, place, log

    def train(self) -> Position:
        """The loop."""
        run, stage, place, log = self.run, self.stage, self.place, self.log
        log.note(f"{place}, {place.device}, {run.train.precision}, {build.backend_of(run, place.device)} layers")
        self.models = {name: self._network(name, role) for name, role in stage.roles.items()}
        self.trained = [model for name, model in self.models.items() if stage.roles[name].train]
        self.first = self.trained[0]  # what checkpoints hold
        self.average = Average(self.first, run.average, schedule.planned_steps(run.train))
        position = self._start()
        loader, self.validation = self._loaders()
        log.resume(position.step)
        clock = Clock(run, position)
        started = saved = position.step
        if run.train.eval_samples and (run.train.steps == 0 or run.train.eval_at_start and not started):
            self._validate(position)

        for micro_batches in self._feed(loader, position):
            lr = schedule.learning_rate(position.step + 1, run.optim, run.schedule, run.train.steps)
            for batch in stage.prepare(micro_batches, self.models):
                for model in self.trained:
                    result = model.forward_backward(batch)
                    _refuse_nan(result.loss, "loss", position, run)
                    norm = _step(model, lr, position, run)
            position = _advance(position, run)
            self.average.after_step(position.step)
            log.step(_record(run, place, position, micro_batches, result, norm, lr, clock.lap(), self.first))
            if _due(run.train.eval_every, position.step):
                self._validate(position)
            if _due(run.checkpoint.save_every, position.step):
                saved = self._save(position)
            if clock.is_over(position):
                break

        if run.train.eval_samples and position.step != started and not _due(run.train.eval_every, position.step):
            self._validate(position)
        if run.checkpoint.save_at_end and saved != position.step:
            self._save(position)
        found = stage.finish(run, self.first)
        if found:
            log.measured(run.stage, position.step, found)
        return position

    # --- what stages may ask for ----------------------------------------------------------------------------------------

    def loader(self, dataset) -> Loader:
        """This replica's micro-batches of a dataset."""
        run, place = self.run, self.place
        return Loader(dataset, run.train.micro_batch, place.dp_rank, place.dp, place.sequence_multiple(run))

    def frozen(self, role: str = "policy", run=None) -> ParallelModel:
        """A network of this run (or another) without gradients, with the weights that the role starts from."""
        model = self._network(role, replace(self.stage.roles.get(role, Role()), train=False), run)
        self._load_start(role, model, is_first=False, run=run)
        return model

    # --- the parts of the loop, in the order in which it calls them -----------------------------------------------------

    def _network(self, name: str, role: Role, run=None) -> ParallelModel:
        source = None if role.train else self._source(name, run or self.run)
        adapters = checkpoint.read_config(source).lora if source else None
        return ParallelModel(run or self.run, self.place, self.stage, name, role.train, role.head, adapters)

    def _source(self, name: str, run) -> Path | None:
        """The checkpoint folder that a role starts from; None for initial weights."""
        source = run.checkpoint.roles.get(name) or run.checkpoint.load
        if not source or name in self.stage.roles and self.stage.roles[name].init == "fresh":
            return None
        folder = checkpoint.find(source)
        if folder is None:
            key = f"checkpoint.roles.{name}" if name in run.checkpoint.roles else "checkpoint.load"
            raise checkpoint.CheckpointError(f"{key}={source} holds no complete checkpoint (iter_*/metadata.json)")
        return folder

    def _start(self) -> Position:
        """Give every role its weights. The first trained one, which checkpoints hold, resumes run.dir when that holds one; every other
        role, and the first in a new run, starts from checkpoint.roles or checkpoint.load, or else from initial weights."""
        run = self.run
        unknown = run.checkpoint.roles.keys() - {*self.stage.roles, *type(self.stage).roles}
        if unknown:
            raise ValueError(f"checkpoint.roles names {', '.join(sorted(unknown))}, but stage {run.stage} has the roles {', '.join(self.stage.roles)}")
        own = checkpoint.find(Path(run.run.dir) / "checkpoints")
        position = Position()
        for name, model in self.models.items():
            is_first = model is self.first
            if is_first and own is not None and not run.tune.l2_to_init:
                continue  # nothing of where it started is needed
            found = self._load_start(name, model, is_first)
            if is_first:
                position = found
                if model.pull:
                    model.pull.remember(model.chunks)
        if own is not None:
            position = checkpoint.load(self.first, own)
            self.average.resume(Path(run.run.dir) / "average", position.step)
            self.log.note(f"resumed {own} at step {position.step}, {position.consumed_samples} samples consumed")
        return position

    def _load_start(self, name: str, model, is_first: bool, run=None) -> Position:
        run = run or self.run
        folder = self._source(name, run)
        if folder is None:
            return Position()
        with_optimizer = run.checkpoint.load_optimizer and is_first
        position = checkpoint.load(model, folder, optimizer=with_optimizer)
        if self.log:
            self.log.note(f"{name}: loaded {folder}" + ("" if with_optimizer else ", weights only"))
        return position if with_optimizer and run.checkpoint.load_position else Position()

    def _loaders(self) -> tuple[Loader, dict[str, Loader]]:
        """The training loader, long enough for every planned step, and one per validation set."""
        run = self.run
        num_train = schedule.consumed_samples_after(schedule.planned_steps(run.train), run.train)
        train, valid = self.stage.datasets(run, max(num_train, 1), _num_valid(run))
        self.stage.begin(run, self, [train, *valid.values()])
        return self.loader(train), {name: self.loader(dataset) for name, dataset in valid.items()}

    def _feed(self, loader, position: Position):
        """This replica's micro-batches, one global batch after another, from `position` on."""
        positions = _positions(self.run, position)
        if not self.run.data.prefetch:
            yield from (loader.batches(*where) for where in positions)
            return
        with Prefetcher(loader, positions) as ahead:
            yield from ahead

    def _validate(self, position: Position) -> None:
        """Every validation set, with the weights as they are and with their average."""
        for name, loader in self.validation.items():
            self.log.validation(name, position.step, *self._measured(loader))
            if self.average.num_taken:
                with self.average.swapped():
                    self.log.validation(f"{name}/average", position.step, *self._measured(loader))

    def _measured(self, loader) -> tuple[float, dict[str, float]]:
        """Mean loss over train.eval_samples, and the means of the stage's metrics."""
        sums = Counter()
        for first in range(0, _num_valid(self.run), self.run.train.global_batch):
            for batch in self.stage.prepare(loader.batches(first, self.run.train.global_batch), self.models):
                found = dict(self.first.evaluate(batch).sums)
                for name, pair in self.stage.measure(batch, self.models).items():
                    found[name] = self.first.total(torch.stack([x.float().reshape(()) for x in pair])).tolist()
                for name, (total, count) in found.items():
                    sums.update({(name, "sum"): total, (name, "count"): count})
        names = {name for name, _ in sums}
        means = {name: sums[name, "sum"] / sums[name, "count"] if sums[name, "count"] else float("nan") for name in sorted(names)}
        return means.pop("loss"), means

    def _save(self, position: Position) -> int:
        if self.average.num_taken:
            self.average.save(Path(self.run.run.dir) / "average", position)
        folder = checkpoint.save(self.first, Path(self.run.run.dir) / "checkpoints", position)
        self.log.note(f"saved {folder}")
        return position.step


class TrainingStopped(ValueError):
    """Training cannot go on without a person; no weight was changed by the step that is named."""


def _num_valid(run) -> int:
    """train.eval_samples in whole global batches."""
    return math.ceil(run.train.eval_samples / run.train.global_batch) * run.train.global_batch


def _positions(run, position: Position):
    consumed = position.consumed_samples
    for _ in range(position.step, schedule.planned_steps(run.train)):
        size = schedule.global_batch(consumed, run.train)
        yield consumed, size
        consumed += size


def _advance(position: Position, run) -> Position:
    size = schedule.global_batch(position.consumed_samples, run.train)
    return Position(position.step + 1, position.consumed_samples + size, position.tokens + size * run.train.seq_len)


def _step(model, lr: float, position: Position, run) -> float | None:
    try:
        return model.step(lr, position.step + 1)
    except NonFiniteGradient as error:
        raise _stopped(str(error), position, run) from None


def _refuse_nan(value: float, what: str, position: Position, run) -> None:
    if not math.isfinite(value):
        raise _stopped(f"the {what} is {value}", position, run)


def _stopped(what: str, position: Position, run) -> TrainingStopped:
    first = position.consumed_samples
    last = first + schedule.global_batch(first, run.train) - 1
    return TrainingStopped(f"step {position.step + 1}: {what} on samples {first} to {last}; the weights are those of step {position.step}. "
                           "Lower optim.lr, look at these samples (data_tools/peek.py), or resume from an earlier checkpoint")


def _record(run, place, position: Position, micro_batches, result, norm, lr: float, seconds: float, model) -> dict:
    """One line of metrics.jsonl."""
    samples = schedule.global_batch(position.consumed_samples - 1, run.train)
    rows, seq_len = micro_batches[0]["tokens"].shape
    rows *= len(micro_batches) * place.dp
    tokens = rows * seq_len
    tflops = metrics.tflops_per_device(metrics.step_flops(run.model, seq_len, rows), seconds, place.world_size)
    record = {
        "step": position.step,
        "loss": result.loss,
        "grad_norm": float("nan") if norm is None else norm,
        "lr": lr,
        "consumed_samples": position.consumed_samples,
        "tokens": tokens,
        "step_time_s": seconds,
        "tokens_per_s": tokens / seconds,
        "global_batch": samples,
        "tflops_per_device": tflops,
        "peak_memory_gib": metrics.peak_memory_gib(),
        "skipped": norm is None,
        **result.metrics,
    }
    utilisation = metrics.mfu(tflops, _peak_tflops(run, place))
    if utilisation is not None:
        record["mfu"] = utilisation
    if run.train.precision == "fp16":
        record["loss_scale"] = model.loss_scale
    if run.model.moe.num_experts:
        record["moe"] = observe.moe_losses(model)
    if run.log.norms:
        record["norms"] = observe.layer_norms(model)
    return record


def _peak_tflops(run, place) -> float | None:
    if run.log.peak_tflops:
        return run.log.peak_tflops
    return metrics.peak_tflops(torch.cuda.get_device_name(), run.train.fp8.recipe != "none") if place.device == "cuda" else None


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class Clock:
    """Time per step, the wall-clock and token limits, and garbage collection at a fixed beat."""

    run: object
    position: Position

    def __post_init__(self):
        self.started = self.last = time.monotonic()
        if self.run.train.manual_gc:
            gc.disable()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds

    def is_over(self, position: Position) -> bool:
        """True, on every rank alike, when train.max_minutes have passed."""
        if self.run.train.manual_gc and position.step % self.run.train.manual_gc == 0:
            gc.collect(1)
        if not self.run.train.max_minutes:
            return False
        over = torch.tensor([float(time.monotonic() - self.started > 60 * self.run.train.max_minutes)])
        if dist.get_backend() == "nccl":
            over = over.cuda()
        dist.broadcast(over, src=0)  # the ranks' clocks differ; rank 0 decides
        return bool(over.item())
