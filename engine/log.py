"""What a run leaves behind and shows: the run folder, one line of metrics.jsonl per step, TensorBoard, wandb and the console.

    log = RunLog(run, rank, world_size, dp_size)       # every rank; only rank 0 writes files that the ranks share
    log.resume(step)                                   # forget lines of steps that will be taken again
    log.step(record)                                   # after every optimizer step
    log.validation("pile", step, loss)
    log.close("done")

A record is a dict of plain numbers with at least: step, loss, grad_norm, lr, consumed_samples, tokens (of this step),
step_time_s, tokens_per_s. Known beside them: data_wait_s (of it: waiting for data), global_batch, tflops_per_device, mfu, peak_memory_gib, loss_scale, num_zeros,
params_norm, skipped (true where no update was taken: by the loss scaler, or for the reason in `why`), spike (how far the loss is above the
recent ones, where engine/faults.py finds one), moe (a dict of losses). Anything else is written too,
nested dicts included; TensorBoard names those outer/inner.

    run.dir/config.yaml  env.json  status.json  metrics.jsonl  tb/  logs/rank_00000.log

Left out: timing, averaging over ranks and measuring memory, which the trainer and engine/metrics.py do; one rank's word counts.
"""

import datetime
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import queue
import subprocess
import sys
import threading
from pathlib import Path

import orjson

from engine import environment
from engine.config import ConfigError, RunConfig, dump_config
from engine.slurm import tasks

# The stages whose loss is that of a language model; parsers of Megatron-LM's console look for this name.
LM_STAGES = ("pretrain", "continued", "long_context", "anneal", "sft")
PACKAGES = ("trireme-lm", "torch", "megatron-core", "transformer-engine", "numpy", "pydantic", "transformers", "tokenizers")


class RunLog:
    """The one place that writes about a run. Modules may also use `logging.getLogger(__name__)`: it goes where `note` goes.

    Raises ConfigError, on every rank, when log.wandb is set and wandb is not installed.
    """

    def __init__(self, run: RunConfig, rank: int, world_size: int, dp_size: int):
        if run.log.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError([f"log.wandb={run.log.wandb} needs the package wandb; pip install wandb, or leave log.wandb empty"])
        self.run, self.dir, self.is_writer = run, Path(run.run.dir), rank == 0
        (self.dir / "logs").mkdir(parents=True, exist_ok=True)
        self._closed, self._metrics, self._bar, self._sinks = False, None, None, []
        self._at = {"step": 0, "consumed_samples": 0}
        self._interval = Interval()
        self._logger, self._handlers = _open_logger(self.dir / "logs" / f"rank_{rank:05d}.log", self.is_writer)
        self._logger.info(f"rank {rank} of {world_size} on {platform.node()}, process {os.getpid()}", extra={"on_console": False})
        if not self.is_writer:
            return
        _write_whole(self.dir / "config.yaml", dump_config(run).encode())
        around = {**_environment(), "world_size": world_size, "dp_size": dp_size, "slurm": tasks.described()}
        _write_whole(self.dir / "env.json", orjson.dumps(around, option=orjson.OPT_INDENT_2))
        self._write_status("running", "")
        if run.log.progress == "bar" or (run.log.progress == "auto" and sys.stdout.isatty()):
            self._bar = _Bar(run)
        if run.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
            self.note("TensorBoard is not installed, so nothing is written to tb/; pip install tensorboard, or set log.tensorboard=false")

    def resume(self, step: int) -> None:
        """Go on after `step` (0: from the start): lines of later steps, and a line cut off by a crash, are dropped.

        A log that is not told takes the step before its first record.
        """
        if not self.is_writer:
            return
        self._close_sinks()
        path = self.dir / "metrics.jsonl"
        drop_lines_after(path, step)
        drop_lines_after(self.dir / "samples.jsonl", step)
        self._metrics = open(path, "ab")
        if self.run.log.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            self._sinks.append(_TensorBoard(self.dir / "tb", step))
        if self.run.log.wandb:
            self._sinks.append(_Wandb(self.run, self.dir))
        if self._bar:
            self._bar.start_at(step)
        self._at["step"] = step

    def step(self, record: dict) -> None:
        """One optimizer step; see the top of this file for the keys."""
        step = record["step"]
        self._at = {"step": step, "consumed_samples": record["consumed_samples"]}
        if not self.is_writer:
            return
        self._append(record, first_step=step)
        for sink in self._sinks:
            sink.write(step, flatten(record))
        self._interval.add(record)
        if self._bar:
            self._bar.show(record)
        if step % self.run.log.every == 0 or step == self.run.train.steps:
            self._show(console_line(self._interval, record, self.run), on_bar=False)
            self._interval = Interval()
            self._write_status("running", "")

    def measured(self, name: str, step: int, found: dict) -> None:
        """What a stage measured after `step` beside its validation sets."""
        if not self.is_writer:
            return
        self._append({"step": step, "split": name, **found}, first_step=step + 1)
        for sink in self._sinks:
            sink.write(step, {f"{name}/{key}": value for key, value in flatten(found).items()})
        self._show_numbers(name, step, found)

    def _show_numbers(self, name: str, step: int, found: dict | None) -> None:
        numbers = flatten(found or {})
        if numbers:
            self._show(f" {name} at iteration {step} | " + " | ".join(f"{key}: {value:.6G}" for key, value in numbers.items()) + " | ")

    def validations(self, step: int) -> dict[str, dict]:
        """What this run's metrics.jsonl holds of validations after `step`, by set; known on rank 0."""
        path = self.dir / "metrics.jsonl"
        if not self.is_writer or not path.exists():
            return {}
        with open(path, "rb") as file:
            return {record["split"]: record for record in map(_parsed, file) if record and "split" in record and record["step"] == step}

    def validation(self, name: str, step: int, loss: float | None, extra: dict | None = None) -> None:
        """Mean loss over the validation set `name` after `step` (None: the stage has none); `extra` holds further numbers of it."""
        if not self.is_writer:
            return
        if loss is None:
            self._append({"step": step, "split": name, **(extra or {})}, first_step=step + 1)
            for sink in self._sinks:
                sink.write(step, {f"valid/{name}/{key}": value for key, value in flatten(extra or {}).items()})
            self._show_numbers(name, step, extra)
            return
        loss = float(loss)
        record = {"step": step, "split": name, "valid_loss": loss, **(extra or {})}
        self._append(record, first_step=step + 1)
        perplexity = math.exp(min(20.0, loss))      # capped as in Megatron-LM
        for sink in self._sinks:
            sink.write(step, {f"valid_loss/{name}": loss, f"valid_ppl/{name}": perplexity,
                              **{f"valid/{name}/{key}": value for key, value in flatten(extra or {}).items()}})
        what = loss_name(self.run.stage)
        self._show(f" validation loss at iteration {step} on {name} | {what} value: {loss:.6E} | {what} PPL: {perplexity:.6E} | ")
        self._show_numbers(name, step, extra)

    def samples(self, step: int, found: list[dict]) -> None:
        """What a model said in `step`, one line each of samples.jsonl."""
        if self.is_writer and found:
            with open(self.dir / "samples.jsonl", "ab") as file:
                file.writelines(orjson.dumps({"step": step, **one}, option=orjson.OPT_APPEND_NEWLINE) for one in found)

    def note(self, text: str) -> None:
        """A message: into this rank's log, and on rank 0 to stderr."""
        self._logger.info(text)

    def close(self, state: str = "done", reason: str = "") -> None:
        """End of the run. state: done, failed, requeue or stopped. Later calls do nothing, so a `finally` may call it again."""
        assert state in ("done", "failed", "requeue", "stopped"), state
        if self._closed:
            return
        self._closed = True
        if self.is_writer:
            self._close_sinks()
            if self._bar:
                self._bar.stop()
            self._write_status(state, reason)
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()

    def abandon(self, reason: str) -> None:
        """This process, of any rank, is about to end without closing anything: status.json says failed."""
        self._write_status("failed", reason)

    @property
    def path(self) -> Path:
        """This rank's log."""
        return Path(self._handlers[0].baseFilename)

    @property
    def file_number(self) -> int:
        """The descriptor of this rank's log, for what must write without Python's help."""
        return self._handlers[0].stream.fileno()

    def _append(self, record: dict, first_step: int) -> None:
        if self._metrics is None:
            self.resume(first_step - 1)
        # default=float: a tensor or an array of one element; nan and infinity become null, as JSON has neither.
        self._metrics.write(orjson.dumps(record, default=float, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        self._metrics.flush()

    def _show(self, line: str, on_bar: bool = True) -> None:
        """To stdout, as Megatron-LM prints it, and into the log; a progress bar already shows what a step's line says."""
        self._logger.info(line, extra={"on_console": False})
        if not self._bar:
            print(line, flush=True)
        elif on_bar:
            self._bar.print(line)

    def _write_status(self, state: str, reason: str) -> None:
        updated = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        status = {"state": state, **self._at, "reason": reason, "updated": updated}
        _write_whole(self.dir / "status.json", orjson.dumps(status, default=float, option=orjson.OPT_APPEND_NEWLINE))

    def _close_sinks(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


class Interval:
    """Means over the steps since the last console line, as Megatron-LM prints them: a bad step spoils no mean."""

    def __init__(self):
        self.num_steps = self.num_skipped = self.num_nan = self.num_losses = 0
        self.seconds = self.loss_sum = self.tflop = 0.0

    def add(self, record: dict) -> None:
        loss = float(record["loss"])
        self.num_steps += 1
        self.seconds += record["step_time_s"]
        self.tflop += record.get("tflops_per_device", 0.0) * record["step_time_s"]
        self.num_skipped += bool(record.get("skipped", False))
        if math.isfinite(loss):
            self.num_losses += 1
            self.loss_sum += loss
        elif not record.get("skipped", False):
            self.num_nan += 1

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_losses if self.num_losses else math.nan


def console_line(interval: Interval, record: dict, run: RunConfig) -> str:
    """Megatron-LM's training line (training_log in megatron/training/training.py): `interval` ends with `record`."""
    fields = [
        f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] iteration {record['step']:8d}/{run.train.steps:8d}",
        f"consumed samples: {record['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1000 * interval.seconds / interval.num_steps:.1f}",
    ]
    if "tflops_per_device" in record:
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {interval.tflop / max(interval.seconds, 1e-9):.1f}")
    fields += [
        f"learning rate: {record['lr']:.6E}",
        f"global batch size: {record.get('global_batch', run.train.global_batch):5d}",
        f"{loss_name(run.stage)}: {interval.loss:.6E}",
        *([f"mtp loss: {record['mtp_loss']:.6E}"] if "mtp_loss" in record else []),
        *(f"{name.replace('_', ' ')}: {value:.6E}" for name, value in flatten(record.get("moe", {})).items()),
        f"loss scale: {record.get('loss_scale', 1.0):.1f}",
        f"grad norm: {record['grad_norm']:.3f}",
    ]
    if "num_zeros" in record:
        fields.append(f"num zeros: {record['num_zeros']}")
    if "params_norm" in record:
        fields.append(f"params norm: {record['params_norm']:.3f}")
    fields += [f"number of skipped iterations: {interval.num_skipped:3d}", f"number of nan iterations: {interval.num_nan:3d}"]
    return " | ".join(fields) + " |"


def loss_name(stage: str) -> str:
    """What the console calls the loss: `lm loss` in Megatron-LM's words, `dpo loss` and so on in other stages."""
    return "lm loss" if stage in LM_STAGES else f"{stage} loss"


def flatten(record: dict, prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by names such as outer/inner; whatever is no number is left out."""
    flat = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None and not isinstance(value, (str, list, tuple)):
            flat[prefix + key] = float(value)
    return flat


def read_metrics(run_dir: str | Path, split: str = "train") -> list[dict]:
    """Records of a run, one per step, in order; `split` names a validation set to get its lines instead.

    nan and infinity come back as None. A last line that a crash cut off is left out.
    """
    with open(Path(run_dir) / "metrics.jsonl", "rb") as file:
        records = [record for line in file if (record := _parsed(line)) is not None]
    return [record for record in records if record.get("split", "train") == split]


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl to what was written up to and including `step`; a cut-off line goes. No file is fine."""
    if not path.exists():
        return
    kept = path.with_suffix(".kept")
    with open(path, "rb") as old, open(kept, "wb") as new:
        for line in old:
            record = _parsed(line)
            if record is not None and record["step"] <= step:
                new.write(line)
    os.replace(kept, path)


def _parsed(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None for one that was cut off."""
    try:
        return orjson.loads(line) if line.endswith(b"\n") else None
    except orjson.JSONDecodeError:
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _environment() -> dict:
    """What a result depends on beside its configuration; nothing is imported for it."""
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": _git_commit(),
        "device": _device(),
        "environment": environment.in_effect(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():      # an installed package may lie inside somebody else's repository
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _device() -> dict:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "num_cores": os.cpu_count()}


def _open_logger(path: Path, on_console: bool) -> tuple[logging.Logger, list[logging.Handler]]:
    # "engine" is the parent of every logging.getLogger(__name__) of this package.
    logger = logging.getLogger("engine")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [file]
    if on_console:
        console = _Stderr()
        console.addFilter(lambda entry: getattr(entry, "on_console", True))
        handlers.append(console)
    for handler in handlers:
        logger.addHandler(handler)
    return logger, handlers


class _Stderr(logging.Handler):
    # A plain StreamHandler keeps the stderr of its birth and would write across a progress bar, which replaces sys.stderr.
    def emit(self, entry: logging.LogRecord) -> None:
        print(self.format(entry), file=sys.stderr, flush=True)


class _TensorBoard:
    """Scalars to tb/, written by a thread: importing TensorBoard takes seconds, which training need not wait for.

    The thread starts at the first write, when the training process has made its own imports.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step, self._queue, self._thread = folder, step, queue.SimpleQueue(), None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
            self._thread.start()
        self._queue.put((step, scalars))

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a run wrote after the checkpoint that it now goes on from.
            with SummaryWriter(str(self._folder), purge_step=self._step + 1 if self._step else None) as writer:
                while (item := self._queue.get()) is not None:
                    step, scalars = item
                    for name, value in scalars.items():
                        writer.add_scalar(name, value, step)
        except Exception:      # curves are not worth a run: metrics.jsonl has every number
            logging.getLogger(__name__).exception("TensorBoard failed; nothing more is written to tb/")


class _Wandb:
    """Scalars to Weights & Biases; the run's id rests in the run folder, so that a requeued job continues its curves."""

    def __init__(self, run: RunConfig, folder: Path):
        import wandb

        remembered = folder / "wandb_id"
        name = remembered.read_text() if remembered.exists() else None
        self._run = wandb.init(project=run.log.wandb, name=folder.name, id=name, dir=str(folder), config=run.model_dump(), resume="allow")
        remembered.write_text(self._run.id)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class _Bar:
    """One line on a terminal: progress, loss, speed, time left."""

    def __init__(self, run: RunConfig):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=Console(force_terminal=True if run.log.progress == "bar" else None))
        self._task = self._progress.add_task(run.stage, total=run.train.steps, shown="")
        self._progress.start()

    def start_at(self, step: int) -> None:
        self._progress.reset(self._task, completed=step)      # reset: steps of an earlier process say nothing about this speed

    def show(self, record: dict) -> None:
        shown = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s"
        self._progress.update(self._task, completed=record["step"], shown=shown)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()
