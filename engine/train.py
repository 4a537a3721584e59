"""READ FIRST: the one loop. Build, load, then for each step: draw, prepare, train, log, validate, save.

    code = train(run)        # on every rank; run is a RunConfig from engine/config.py

Everything below is the same for every stage and every layout: a stage (engine/stages/) says what the data and the loss are,
engine/mcore/ spreads a network over ranks, engine/data/ turns a sample number into tensors. The state of a run is its
networks and one Position. Left out on purpose: branches for features; they live in a stage, the log or a helper below.
"""

import contextlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine import profiling, rollback, run_folder, schedule
from engine.batches import Feed, global_batches
from engine.checks import cross_checks
from engine.config import ConfigError
from engine.hf.convert import beside_checkpoint, check_expressible
from engine.hf.fields import HFError
from engine.data import feed as moving
from engine.data.buffers import Pool
from engine.data.ledger import Ledger, history
from engine.data.loader import Loader, outline
from engine.data.replica import Replica
from engine.faults import Asked, Guard, Switches, TrainingStopped, listed
from engine.log import RunLog
from engine.mcore import build, checkpoint, replicas, saving, saving_run, topology
from engine.mcore.average import Average
from engine.mcore.checkpoint import Position
from engine.mcore.run import ParallelModel, Result
from engine.stage import Batch, Role
from engine.signals import stacks_into
from engine.stages import build_stage
from engine.step_record import Clock, Updates, due, record
from engine.watch import Watch


def train(run, signals=None) -> str:
    """Train one stage to its end on every rank of the process group. Returns how it ended: done, requeue or stopped (see engine/faults.py).

    signals: engine/signals.py's, where somebody has installed them. Raises ValueError (ConfigError, DataError, CheckpointError,
    TrainingStopped among them) for what a person must mend.
    """
    stage = build_stage(run.stage)
    place, words = topology.start(run), []
    run = stage.configure(saving.settled(run, words.append))
    with contextlib.closing(stage):
        switches = Switches(run, signals)
        for part in stage.runs(run, Trainer(run, stage, place)):  # one, but for stages that are a ladder of runs
            if part.checkpoint.load != run.checkpoint.load:
                part = saving.settled(part, words.append)
            log = RunLog(part, place.rank, place.world_size, place.dp)
            while words:
                log.note(words.pop(0))
            try:
                with stacks_into(log.file_number), Watch(part.faults.hang_seconds, log.path.parent, place, log) as watch:
                    asked = Trainer(part, stage, place, log, switches, watch).train()
                log.close(asked.leave or "done", asked.reason)
            except BaseException as error:
                log.close("failed", str(error) or type(error).__name__)
                raise
            if asked.leave not in ("", "done"):
                return asked.leave
    return "done"


class Trainer:
    """The parts of one run on this rank. A stage may ask it for a `loader`, to `spread` a batch, and for a `frozen` network."""

    copies = replica = None  # engine/data/feed.py's, and replica.py's where one rank reads for others

    def __init__(self, run, stage, place, log=None, switches=None, watch=None):
        self.run, self.stage, self.place, self.log, self.switches, self.watch = run, stage, place, log, switches, watch

    def train(self) -> Asked:
        """The loop. Returns why it ended before the last step, if it did."""
        run, stage, place, log, switches = self.run, self.stage, self.place, self.log, self.switches
        log.note(f"{place}, {place.device}, {run.train.precision}, {build.backend_of(run, place.device)} layers")
        if run.checkpoint.also_save_hf:
            check_expressible(run)  # before the hours of training that it would come after
        self.copies = moving.open_copies(run, place.device)
        self.models = {name: self._network(name, role) for name, role in stage.roles.items()}
        self.trained = {name: model for name, model in self.models.items() if stage.roles[name].train}
        self.first, *_ = self.trained.values()  # what a checkpoint is of; it holds the others beside it
        self.saver = saving_run.Saver(run.checkpoint, run.run.timeout_minutes, log.note, [Path(run.checkpoint.load)] if run.checkpoint.load else [])
        self.guard = Guard(run.faults, switches, log.note)
        position = self._start()
        loader = self._begin(position)
        clock = Clock(run)
        if run.train.eval_samples and (run.train.steps == 0 or run.train.eval_at_start and not position.step):
            self._validate(position)

        asked = switches.ask()
        with (Feed(run, loader, position, stage.draws_freely, self.copies) as feed, contextlib.closing(self.saver),
              profiling.opened(run, place, position.step, log.note) as profile):
            while self._goes_on(position) and not asked.leave:
                feed.step = position.step + 1
                profile.step(feed.step)
                lr = schedule.learning_rate(feed.step, run.optim, run.schedule, run.train.steps)
                drawn = stage.draw(feed, self.models)
                updates = Updates(self.trained)
                for batch in stage.prepare(drawn, self.models):
                    for name in self.trained:
                        if stage.learns(name, feed.step):
                            updates.add(name, batch, *self._learn(name, batch, lr, feed))
                before, position = position, feed.position(position)
                self.average.after_step(position.step)
                line = record(run, place, before, position, updates, lr, clock.lap(), self.first)
                log.step({**line, "data_wait_s": feed.waited(), **self._read(position), **stage.report(), **self.guard.report()})
                self.watch.beat()
                if self.guard.wants_rollback and (earlier := self._roll_back(position, feed)):
                    position = earlier
                    continue
                if due(run.faults.replica_check_every, position.step):
                    self._compare_replicas(position)
                if due(run.train.eval_every, position.step):
                    self._validate(position)
                self.saver.look()
                asked = switches.ask()
                if due(run.checkpoint.save_every, position.step) or asked.save:
                    self._save(position, waits=asked.save)
                clock.collect_garbage(position.step)

        asked = asked if self._goes_on(position) else Asked()
        is_hurried = asked.leave in ("requeue", "stopped")
        if run.train.eval_samples and self.validated != position.step and not is_hurried:
            self._validate(position)
        self.saver.finish()
        if (run.checkpoint.save_at_end or is_hurried) and (self.saved != position.step or self.saver.num_failed):
            self._save(position, must=True)
        self.watch.rest()
        found = None if is_hurried else stage.finish(run, self.first)
        if found:
            log.measured(run.stage, position.step, found)
        if self.replica:
            log.note(f"data: {sum(one.num_samples_read for one in (feed.loader, *self.validation.values()))} samples read on this rank, "
                     f"{self.replica.num_bytes_received} bytes received")
            self.replica.close()
        return asked

    # --- what stages may ask for ----------------------------------------------------------------------------------------

    def loader(self, dataset, pool: Pool | None = None, line=None) -> Loader:
        """This replica's micro-batches of a dataset. line: where only its first rank has that."""
        run, place = self.run, self.place
        return Loader(dataset, run.train.micro_batch, place.dp_rank, place.dp, place.sequence_multiple(run), pool, line,
                      text_to_ends=not self.stage.reads_text_everywhere)

    def spread(self, whole: Batch, micro_batch: int) -> list[Batch]:
        """This replica's micro-batches of a global batch that every rank knows, tensors of [rows, s] or [rows]. Neighbouring rows go to
        different replicas, so that a part of the batch is the same under every layout. Where rows are missing others stand
        again: `weights` [b] is 1 for what counts and 0 for those."""
        rows, place = len(whole["tokens"]), self.place
        stride = micro_batch * place.dp * (place.pp if self.run.parallel.vpp > 1 else 1)
        numbers = torch.arange(-(-rows // stride) * stride)
        weights = (numbers < rows).float()
        numbers = torch.where(numbers < rows, numbers, numbers % rows)
        missing = -whole["tokens"].size(1) % place.sequence_multiple(self.run)
        whole = {name: F.pad(t, (0, missing)) if t.dim() == 2 else t for name, t in whole.items()}
        found = []
        for start in range(place.dp_rank * micro_batch, len(numbers), micro_batch * place.dp):
            own = slice(start, start + micro_batch)
            found.append({name: t[numbers[own]] for name, t in whole.items()} | {"weights": weights[own]})
        return found

    def frozen(self, role: str = "policy", run=None) -> ParallelModel:
        """A network of this run (or another) without gradients, with the weights that the role starts from."""
        model = self._network(role, replace(self.stage.roles.get(role, Role()), train=False), run)
        self._load_start(role, model, is_first=False, run=run)
        return model

    # --- the parts of the loop ------------------------------------------------------------------------------------------

    def _learn(self, name: str, batch, lr: float, feed) -> tuple[Result, float | None]:
        """One update of a role, unless it would do harm. Returns what was found and the gradient norm, None where the update was skipped."""
        model = self.trained[name]
        result = model.forward_backward(batch)
        self.saver.copied()  # what is being saved may change from here on
        norm = model.gradient_norm(lr * self._relative_rate(name), feed.step)
        if self.guard.verdict(name, model, result, norm, feed, is_first=model is self.first):
            model.skip_update()
            return result, None
        if norm is not None:
            model.update(norm)
        return result, norm

    def _compare_replicas(self, position: Position) -> None:
        """Raises TrainingStopped where ranks that must hold the same weights do not, unless faults.replica_mismatch is warn."""
        found = [problem if model is self.first else f"{name}: {problem}" for name, model in self.trained.items() for problem in replicas.mismatches(model)]
        if not found:
            return
        told = f"after step {position.step}, {listed(found, '; ')}"
        if self.run.faults.replica_mismatch == "stop":
            known_good = max(0, position.step - self.run.faults.replica_check_every)
            raise TrainingStopped(f"{told}. Checkpoints after step {known_good} may hold it; start again from an earlier one, without that machine "
                                  "until its memory has been tested")
        self.log.note(told)

    def _goes_on(self, position: Position) -> bool:
        return position.step < schedule.planned_steps(self.run.train) and not self.has_reached_goal

    def _network(self, name: str, role: Role, run=None) -> ParallelModel:
        run = run or self.run
        source = self._source(name, run)
        if role.head == "scalar" and name in run.checkpoint.roles and name != next(iter(self.stage.roles)):
            run = _of_checkpoint(run, name, source)  # a reward model, and the critic made of it, may have sizes of their own
        adapters = checkpoint.read_config(source).lora if source and not role.train else None
        return ParallelModel(run, self.place, self.stage, name, role, adapters, self.copies)

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
        """Give every role its weights. Those that learn resume run.dir when that holds a checkpoint; every other role, and all in a new
        run, start from checkpoint.roles or checkpoint.load, or else from initial weights."""
        run = self.run
        unknown = run.checkpoint.roles.keys() - {*self.stage.roles, *type(self.stage).roles}
        if unknown:
            raise ValueError(f"checkpoint.roles names {', '.join(sorted(unknown))}, but stage {run.stage} has the roles {', '.join(self.stage.roles)}")
        own = self._own_checkpoint()
        position = Position()
        for name, model in self.models.items():
            is_first = model is self.first
            if own is not None and name in self.trained and not (is_first and run.tune.l2_to_init):
                continue  # nothing of where it started is needed
            found = self._load_start(name, model, is_first)
            if is_first:
                position = found
                if model.pull:
                    model.pull.remember(model.chunks)
        if own is not None:
            return self._resume(own)
        self.average, self.read_until = self._new_average(), position.consumed_samples
        return position

    def _own_checkpoint(self) -> Path | None:
        """The newest good one of run.dir, or, where the run has gone back since that was written, the one that it went back to."""
        self.rollbacks = _of_first_rank(lambda: rollback.read(self.run.run.dir))
        own = self._resumable()
        entry = own and rollback.unknown_to(self.rollbacks, _num_rollbacks(own))
        return self._resumable(entry.to_step) if entry else own

    def _resumable(self, at_most: int | None = None) -> Path | None:
        """The newest good checkpoint of run.dir (of a step up to at_most); what the run has of later steps is set aside."""
        folder = Path(self.run.run.dir)
        own = saving.resume_from(folder / "checkpoints", self.run.checkpoint.verify, self.log.note, folder / "average", at_most)
        if own:
            saving.set_aside_newer(folder / "hf", run_folder.step_of(own))
        return own

    def _resume(self, own: Path) -> Position:
        """Take everything from a checkpoint of this run. Where the run went back to it, the data goes on behind what was read by then."""
        run = self.run
        position = checkpoint.load(self.first, own)
        for name, model in self.trained.items():
            if model is not self.first:
                checkpoint.load(model, own / "roles" / name)
        state = checkpoint.read_stage(own)
        self.stage.restore(state)
        self.guard.restore(state.get("faults", {}))
        self.average = self._new_average()
        self.average.resume(Path(run.run.dir) / "average", position.step)
        self.read_until = position.consumed_samples
        entry = rollback.unknown_to(self.rollbacks, _num_rollbacks(own))
        if entry and entry.to_step == position.step:
            position = replace(position, consumed_samples=entry.next_sample)
        self.log.note(f"resumed {own} at step {position.step}, {position.consumed_samples} samples consumed")
        return position

    def _new_average(self) -> Average:
        return Average(self.first, self.run.average, schedule.planned_steps(self.run.train))

    def _begin(self, position: Position) -> Loader:
        """Open the data and the log where the run stands. Returns the training loader."""
        loader, self.validation = self._loaders(position)
        self.ledger = Ledger(loader.dataset)
        self.ledger.begin(self.read_until, *history(self.run))
        self.log.resume(position.step)
        self.saved = position.step
        self._remember_validations(position.step)
        return loader

    def _roll_back(self, position: Position, feed) -> Position | None:
        """After a spike: go back to a checkpoint of faults.rollback_steps ago or earlier, and on with the data behind this step's. None where
        there is no such checkpoint. Raises TrainingStopped after faults.max_rollbacks."""
        wanted, why = self.run.faults, self.guard.wants_rollback
        self.guard.wants_rollback = ""
        if len(self.rollbacks) >= wanted.max_rollbacks:
            raise TrainingStopped(f"step {position.step}: {why}. The run has gone back faults.max_rollbacks={wanted.max_rollbacks} times "
                                  f"({rollback.NAME} says where from); lower optim.lr, or look at the data")
        self.saver.finish()
        folder = Path(self.run.run.dir)
        found = saving.newest_verified(folder / "checkpoints", position.step - wanted.rollback_steps, self.log.note, folder / "average")
        if found is None:
            self.log.note(f"no checkpoint of step {position.step - wanted.rollback_steps} or before to go back to")
            return None
        earlier = checkpoint.read_position(found)
        entry = rollback.Entry(position.step, earlier.step, earlier.consumed_samples, position.consumed_samples, why)
        if self.place.rank == 0:
            rollback.record(folder, entry)
        self.rollbacks.append(entry)
        self.log.note(f"going back from step {entry.at_step} to {entry.to_step}; samples {entry.first_sample} to {entry.next_sample - 1} are passed over")
        feed.close()
        if self.replica:
            self.replica.close()
        position = self._resume(self._resumable(entry.to_step))
        feed.start(self._begin(position), position)
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

    def _loaders(self, position: Position) -> tuple[Loader, dict[str, Loader]]:
        """The training loader, long enough for every planned step, and one per validation set."""
        run, place = self.run, self.place
        kind = moving.buffer_kind(run, place.device)
        if run.data.read_on == "first_rank":
            if not self.stage.datasets_stay_with_reader:
                raise ConfigError([f"data.read_on=first_rank, but stage={run.stage} looks at its data on every rank; set data.read_on=every_rank"])
            if place.tp * place.pp * place.cp > 1:
                self.replica = Replica(place, run.run.timeout_minutes, not self.stage.reads_text_everywhere, kind == "shared")
        train, valid = self._datasets(position)
        self.stage.begin(run, self, [train, *valid.values()])
        ahead, now = (self.replica.ahead, self.replica.now) if self.replica else (None, None)
        pools = Pool(kind), Pool("shared" if kind == "shared" else "plain")  # a validation batch is waited for, so pinning it would gain nothing
        return self.loader(train, pools[0], ahead), {name: self.loader(dataset, pools[1], now) for name, dataset in valid.items()}

    def _datasets(self, position: Position):
        """The stage's, or on a rank that is told its batches by another their outlines."""
        run, found = self.run, None
        planned = schedule.planned_steps(run.train)
        num_train = max(schedule.consumed_samples_after(planned, run.train), 1)
        if self.rollbacks:  # samples were passed over
            num_train = position.consumed_samples + sum(size for _, size in global_batches(run.train, position.consumed_samples, planned - position.step))

        def outlines():
            nonlocal found
            found = train, valid = self.stage.datasets(run, num_train, _num_valid(run))
            return outline(train), {name: outline(dataset) for name, dataset in valid.items()}

        if not self.replica:
            return self.stage.datasets(run, num_train, _num_valid(run))
        told = self.replica.told(outlines)
        return found or told

    def _read(self, position: Position) -> dict:
        """The ledger's part of a step's record: with every console line, since there may be many sources."""
        is_due = due(self.run.log.every, position.step) or position.step == schedule.planned_steps(self.run.train)
        return self.ledger.record(position.consumed_samples) if is_due else {}

    def _relative_rate(self, name: str) -> float:
        """The learning rate of a role, as a multiple of the run's."""
        rate = self.stage.roles[name].lr
        return rate / self.run.optim.lr if rate and self.run.optim.lr else 1.0

    @profiling.phase("validate")
    def _validate(self, position: Position) -> None:
        """Every validation set, with the weights as they are and with their average."""
        self.validated = position.step
        for name, loader in self.validation.items():
            loss, means = self._measured(loader)
            self.log.validation(name, position.step, loss, means)
            self.has_reached_goal |= self._is_goal(name, means if loss is None else {"valid_loss": loss, **means})
            if self.average.num_taken:
                self.saver.copied()
                with self.average.swapped():
                    self.log.validation(f"{name}/average", position.step, *self._measured(loader))

    def _remember_validations(self, step: int) -> None:
        """What a process before this one has found of these weights: a killed one may have, or not."""
        known = [self.log.validations(step)]
        dist.broadcast_object_list(known, src=0)
        self.validated = step if known[0] else None
        self.has_reached_goal = any(self._is_goal(name, means) for name, means in known[0].items() if name in self.validation)

    def _is_goal(self, name: str, means: dict[str, float]) -> bool:
        """Is this what train.stop_when waits for? The same on every rank, since the means are."""
        goal = self.run.train.stop_when
        if not goal.metric or name != (goal.set or next(iter(self.validation))):
            return False
        if goal.metric not in means:
            raise ValueError(f"train.stop_when.metric={goal.metric} is no number of the validation set {name}; there are {', '.join(sorted(means))}")
        value = means[goal.metric]
        reached = (goal.at_most is not None and value <= goal.at_most) or (goal.at_least is not None and value >= goal.at_least)
        if reached:
            self.log.note(f"train.stop_when: {goal.metric} of {name} is {value:.6g}; training stops")
        return reached

    def _measured(self, loader) -> tuple[float | None, dict[str, float]]:
        """Mean loss over train.eval_samples, if the stage validates one, and the means of the stage's metrics."""
        sums = Counter()
        for first in range(0, _num_valid(self.run), self.run.train.global_batch):
            if self.validated:  # not before the first step
                self.watch.beat()
            for found in self._found(loader.batches(first, self.run.train.global_batch)):
                for name, (total, count) in found.items():
                    sums.update({(name, "sum"): total, (name, "count"): count})
        names = {name for name, _ in sums}
        means = {name: sums[name, "sum"] / sums[name, "count"] if sums[name, "count"] else float("nan") for name in sorted(names)}
        return means.pop("loss", None), means

    def _found(self, micro_batches):
        """For each batch that the stage makes of a global batch: name -> (sum, count) over all replicas."""
        for batch in self.stage.prepare(micro_batches, self.models) if self.stage.validates_loss else [micro_batches]:
            found = dict(self.first.evaluate(batch).sums) if self.stage.validates_loss else {}
            for name, pair in self.stage.measure(batch, self.models).items():
                found[name] = self.first.total(torch.stack([x.double().reshape(()) for x in pair])).tolist()
            yield found

    @profiling.phase("save")
    def _save(self, position: Position, must: bool = False, waits: bool = False) -> None:
        """Save, or with checkpoint.async_save begin to. waits: it is written, or could not be, when this returns; must: the latter raises an error."""
        root, contents = Path(self.run.run.dir), {}
        if self.average.num_taken:
            contents[checkpoint.folder_of(root / "average", position.step)] = self.average.contents(position)
        others = {name: model for name, model in self.trained.items() if model is not self.first}
        faults = {**self.guard.state(), "rollbacks": len(self.rollbacks)}
        state = {**self.stage.state(), **self.ledger.state(position.consumed_samples), "faults": faults}
        folder = checkpoint.folder_of(root / "checkpoints", position.step)
        contents[folder] = checkpoint.contents(self.first, position, others, state)
        self.saver.save(contents, must)
        if waits or self.run.checkpoint.also_save_hf:
            self.saver.finish(must)
        self.switches.was_saved()
        if self.run.checkpoint.also_save_hf and not self.saver.num_failed:
            self._save_hf(folder, position)
        self.saved = position.step
        self.watch.beat()

    def _save_hf(self, folder: Path, position: Position) -> None:
        """The Hugging Face folder of a checkpoint, by rank 0. Neither a full disk nor a tokenizer that has gone ends training."""
        if self.place.rank == 0:
            try:
                out = beside_checkpoint(self.run, checkpoint.read_tensors(folder), folder, position.tokens)
                self.log.note(f"exported {out}")
            except (OSError, HFError) as error:
                self.log.note(f"no Hugging Face folder for {folder}: {error}; make it with launch/convert.py to-hf")
        dist.barrier()


def _of_checkpoint(run, role: str, folder: Path):
    """The run with the model of a role's own checkpoint. Raises ConfigError where this layout cannot hold it."""
    written = checkpoint.read_config(folder)
    changed = run.model_copy(update={"model": written.model})
    if problems := set(cross_checks(changed, None)) - set(cross_checks(run, None)):
        raise ConfigError([f"checkpoint.roles.{role}={folder}: {problem}" for problem in sorted(problems)])
    return changed


def _of_first_rank(find):
    """What find() returns on rank 0, on every rank: a shared folder need not look the same everywhere."""
    told = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _num_rollbacks(folder: Path) -> int:
    """Of how many rollbacks the checkpoint knows."""
    return checkpoint.read_stage(folder).get("faults", {}).get("rollbacks", 0)


def _num_valid(run) -> int:
    """train.eval_samples in whole global batches."""
    return math.ceil(run.train.eval_samples / run.train.global_batch) * run.train.global_batch
