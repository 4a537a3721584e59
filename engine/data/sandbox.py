"""Worker processes with limits, for code that came with a model: a job is called on items, and may be killed.

    with Pool("engine.data.conversations:Encoder", {"chat": {...}}, num_workers=2, seconds=20, mib=2048, what="chat template x.jinja") as pool:
        for answers in pool.map(chunks):          # chunks: iterable of lists of items; answers in the same order
            ...                                   # one Answer per item: a value, or the sentence of a ValueError

A job is a class, named as module:class; each worker makes one from the arguments and calls it with one item at a time. Arguments, items
and values are what JSON can say. While a chunk is worked on, the process may take `seconds` of processor time and `mib` of memory more
than it had when the job was made, write no files and leave no core; one that takes more is killed and the chunk ends in a DataError that
names the limit. Workers are plain interpreters that import only what the job imports: they start alike below torchrun and below pytest.
Left out: namespaces and system-call filters; jinja's sandbox keeps a template from reaching anything to call.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson

from engine.data.indexed import DataError

MIB = 1 << 20
MAX_WORKERS = 8


@dataclass(frozen=True)
class Answer:
    """What the job made of one item: its value, or why there is none."""

    value: object = None
    error: str = ""


class WorkerDied(DataError):
    """A worker was killed or ran out of memory; item: the number in its chunk of what it worked on."""

    def __init__(self, text: str, item: int) -> None:
        super().__init__(text)
        self.item = item


class Pool:
    """num_workers processes (0: one per core, 8 at most) that make one job each. what: the name of the suspect, for errors."""

    def __init__(self, job: str, arguments: dict, num_workers: int = 0, seconds: float = 20.0, mib: int = 2048, what: str = "the job") -> None:
        count = num_workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        self._workers = [_Worker(job, arguments, seconds, mib, what) for _ in range(count)]
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sandbox")

    def map(self, chunks: Iterable[list]) -> Iterator[list[Answer]]:
        """The answers of each chunk, in order. Raises DataError when a job cannot be made, WorkerDied when a worker is killed."""
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._work, chunk))
            if len(waiting) > 3 * len(self._workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _work(self, chunk: list) -> list[Answer]:
        worker = self._idle.get()
        try:
            return worker.ask(chunk)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers, whatever they do."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The parent's side of one process."""

    def __init__(self, job: str, arguments: dict, seconds: float, mib: int, what: str) -> None:
        self._limits, self._what = (seconds, mib), what
        self._progress = tempfile.TemporaryFile()
        self._errors = tempfile.TemporaryFile()
        setup = orjson.dumps({"job": job, "arguments": arguments, "seconds": seconds, "mib": mib, "progress": self._progress.fileno()})
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                       "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", "from engine.data.sandbox import serve; serve()"], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, pass_fds=[self._progress.fileno()])
        with contextlib.suppress(BrokenPipeError):      # told by the first ask
            _send(self._process.stdin, setup)

    def ask(self, chunk: list) -> list[Answer]:
        try:
            _send(self._process.stdin, orjson.dumps(chunk))
            reply = orjson.loads(_receive(self._process.stdout))
        except (EOFError, OSError):
            raise self._death() from None
        if "refused" in reply:
            raise DataError(reply["refused"])
        if "memory" in reply:
            raise WorkerDied(self._too_much_memory(), reply["memory"])
        if "bug" in reply:
            raise RuntimeError(reply["bug"])
        return [Answer(**answer) for answer in reply["answers"]]

    def _death(self) -> WorkerDied:
        code, (seconds, _) = self._process.wait(), self._limits
        raw = os.pread(self._progress.fileno(), 8, 0)
        item = struct.unpack("<q", raw)[0] if len(raw) == 8 else 0
        if -code == signal.SIGXCPU:
            return WorkerDied(f"{self._what} was stopped after {seconds:g} s of processor time (chat.template_seconds) on one chunk of data; "
                              "it may loop without end: mend it, or raise the limit", item)
        if -code == signal.SIGKILL:
            return WorkerDied(f"{self._what}: its worker process was killed from outside, most often because the machine has no memory left; set "
                              "chat.workers to fewer", item)
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        if -code in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
            return WorkerDied(self._too_much_memory(), item)
        return WorkerDied(f"{self._what}: its worker process ended with code {code} {' '.join(words)}".rstrip(), item)

    def _too_much_memory(self) -> str:
        return f"{self._what} was stopped at {self._limits[1]} MiB of memory (chat.template_mib); mend it, or raise the limit"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._progress, self._errors):
            with contextlib.suppress(OSError):
                file.close()


def _send(pipe, message: bytes) -> None:
    pipe.write(struct.pack("<q", len(message)) + message)
    pipe.flush()


def _receive(pipe) -> bytes:
    """One message. Raises EOFError when the other side has gone."""
    head = pipe.read(8)
    body = pipe.read(struct.unpack("<q", head)[0]) if len(head) == 8 else b""
    if len(head) < 8 or len(body) < struct.unpack("<q", head)[0]:
        raise EOFError
    return body


# --- the worker's side ------------------------------------------------------------------------------------------------


def serve() -> None:
    """The life of a worker: make the job, answer chunks until the pipe ends."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)      # what a library prints must not enter the protocol
    setup = orjson.loads(_receive(source))
    job, refusal = _make(setup)
    limit_memory(setup["mib"])
    while True:
        try:
            chunk = orjson.loads(_receive(source))
        except EOFError:
            return
        limit_time(setup["seconds"])
        reply = refusal or _answer(job, chunk, setup["progress"])
        limit_time(0)
        _send(target, reply if isinstance(reply, bytes) else orjson.dumps(reply))


def _make(setup: dict) -> tuple[object, dict]:
    module, name = setup["job"].split(":")
    try:
        return getattr(importlib.import_module(module), name)(**setup["arguments"]), {}
    except ValueError as error:
        return None, {"refused": str(error)}
    except Exception:
        return None, {"bug": traceback.format_exc()}


def _answer(job, chunk: list, progress: int) -> dict | bytes:
    answers, k = [], 0
    try:
        for k, item in enumerate(chunk):
            os.pwrite(progress, struct.pack("<q", k), 0)
            try:
                answers.append({"value": job(item)})
            except ValueError as error:
                answers.append({"error": str(error)})
        return orjson.dumps({"answers": answers})
    except MemoryError:
        return {"memory": k}
    except Exception:
        return {"bug": traceback.format_exc()}


def limit_memory(mib: int) -> None:
    """From now on this process may map `mib` MiB more than it has, write files of a few bytes, and leave no core."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + mib * MIB)
    _lower(resource.RLIMIT_FSIZE, 4096)
    _lower(resource.RLIMIT_CORE, 0)


def limit_time(seconds: float) -> None:
    """The kernel ends this process after so many more seconds of processor time (whole seconds, rounded up); 0 lifts the limit."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) if seconds else resource.RLIM_INFINITY
    _lower(resource.RLIMIT_CPU, limit)


def _lower(kind: int, limit: int) -> None:
    """Set the soft limit, below the hard one that others have set."""
    hard = resource.getrlimit(kind)[1]
    below = limit if hard == resource.RLIM_INFINITY else hard if limit == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (below, hard))
