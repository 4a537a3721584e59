"""One stage is one torchrun: start it, show how far it is, and leave none of its ranks behind.

    with folder_lock(dir) as lock:
        code = torchrun(Job(...), lock)

Its output goes to a file; the terminal gets a short line now and then. When this process is interrupted, its torchrun and every rank are
ended; when it is killed outright, the kernel tells torchrun (Linux), and the lock, which torchrun holds too, keeps a second start waiting until
the last rank is gone. Left out: several machines, which need one torchrun each.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.config import ConfigError
from engine.log import read_metrics
from engine.signals import end_with

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 20       # torchrun needs some to end its ranks
SHOW_SECONDS = 30        # between lines where the terminal cannot be written over


@dataclass(frozen=True)
class Job:
    """One run of launch/pretrain.py or align.py. folders: where its metrics.jsonl will be, in order; steps: of all of them."""

    title: str
    script: str
    config: Path
    ranks: int
    torchrun: list[str]
    output: Path
    folders: list[Path]
    steps: int

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), *self.torchrun,
                str(ROOT / "launch" / self.script), str(self.config)]


def torchrun(job: Job, lock: int | None = None) -> int:
    """Run a job to its end. Returns its exit code. lock: file descriptor that torchrun inherits."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, "ab") as output:
        output.write(f"== {' '.join(job.command)}\n".encode())
        output.flush()
        process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   pass_fds=() if lock is None else (lock,), preexec_fn=end_with(os.getpid()))
        progress = Progress(job)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=1)
                progress.show()
        finally:
            progress.close()
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a torchrun and all that it started, gently first. Its ranks have sessions of their own, so they are found before it goes."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:      # also when a second signal comes while we wait
        for survivor in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                survivor.kill()
        process.wait()


@contextlib.contextmanager
def folder_lock(folder: Path, seconds: float = 60) -> Iterator[int]:
    """Hold a recipe's folder for this process and the torchruns it starts. Raises ConfigError when another holds it for longer than `seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        deadline, told = time.monotonic() + seconds, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError([f"another recipe.py, or ranks that one left, is at work in {folder}; wait for it or end it"]) from None
                if not told:
                    print(f"waiting for another recipe.py, or the ranks that one left, to leave {folder}", file=sys.stderr, flush=True)
                told = True
                time.sleep(0.5)
        yield file.fileno()


class Progress:
    """`sft  120/300  loss 0.5120  left 2:10`, over itself on a terminal, a line every half minute elsewhere."""

    def __init__(self, job: Job, stream=sys.stdout):
        self.job, self.stream, self.is_tty = job, stream, stream.isatty()
        self.shown_at, self.shown = time.monotonic(), ""

    def show(self) -> None:
        now = time.monotonic()
        if now - self.shown_at < (2 if self.is_tty else SHOW_SECONDS):
            return
        self.shown_at, line = now, progress_line(self.job)
        if line and line != self.shown:
            self.shown = line
            print(f"\r\033[K{line}" if self.is_tty else line, end="" if self.is_tty else "\n", file=self.stream, flush=True)

    def close(self) -> None:
        if self.is_tty and self.shown:
            print("\r\033[K", end="", file=self.stream, flush=True)


def progress_line(job: Job) -> str:
    """How far a job is, from its metrics.jsonl; empty before the first step."""
    parts = [read_metrics(folder) for folder in job.folders if (folder / "metrics.jsonl").is_file()]
    lines = [line for part in parts for line in part]
    if not lines or not job.steps:
        return ""
    done, recent = sum(part[-1]["step"] for part in parts if part), lines[-20:]
    left = (job.steps - done) * sum(line["step_time_s"] for line in recent) / len(recent)
    loss = "nan" if lines[-1]["loss"] is None else f"{lines[-1]['loss']:.4f}"
    return f"  {job.title}  {done}/{job.steps}  loss {loss}  left {clock(left)}"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
