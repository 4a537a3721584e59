"""A process that a job runs in and that can be killed: rules with patterns, libraries of others, functions of the user.

    worker = Worker("engine.rewards.rules:Regex", {"pattern": "<answer>"})      # returns at once
    worker.wait_until_ready()                                                   # raises Refused when the job cannot be made
    for reply in worker.ask(items, seconds=10): ...                             # one reply within `seconds` each, else Hung

A job is a class, named as module:class; called with items it yields replies. The time limit is the wall clock's and is kept here, so a job
may hold the interpreter's lock, sleep, run in a thread or use SIGALRM. A worker is a fresh interpreter that imports only what its job
imports, and is kept between calls. Left out: several jobs in one worker, and confinement (programs.py has it; these jobs are trusted).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

START_SECONDS = 300.0      # imports from a slow disk, or a function's own model
GRACE_SECONDS = 30


class Refused(ValueError):
    """The job cannot be made."""


class Failed(ValueError):
    """The job raised, or its process ended."""


class Hung(ValueError):
    """The job took longer than it may; the worker is gone."""


class Worker:
    """The caller's side."""

    def __init__(self, job: str, arguments: dict) -> None:
        self._pipe, theirs = Pipe()
        self._is_ready = False
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        code = f"from engine.rewards.worker import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen([sys.executable, "-u", "-c", code], env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                                         pass_fds=[theirs.fileno()])
        theirs.close()
        self._send({"job": job, "arguments": arguments})

    def wait_until_ready(self) -> None:
        """Raises Refused, Failed or Hung."""
        if not self._is_ready:
            self._receive(START_SECONDS)
            self._is_ready = True

    def ask(self, items: list, seconds: float) -> Iterator:
        """The job's replies to these items. Raises Failed; Hung when one takes longer than `seconds`."""
        self.wait_until_ready()
        self._send({"items": items, "seconds": seconds})
        while (reply := self._receive(seconds)) is not None:
            yield reply

    def _send(self, message) -> None:
        with contextlib.suppress(OSError):      # told by the next _receive
            self._pipe.send(message)

    def _receive(self, seconds: float):
        if not self._pipe.poll(seconds):
            self.close()
            raise Hung(f"no answer within {seconds:g} s")
        try:
            kind, content = self._pipe.recv()
        except (EOFError, OSError):
            raise Failed(f"its process ended with code {self._process.wait()}") from None
        if kind == "refused":
            raise Refused(content)
        if kind == "failed":
            raise Failed(content)
        return content

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


# --- the worker's side ------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """The life of a worker: make the job, answer until the pipe ends. Messages: ("reply", content), content None after the last one."""
    pipe = Connection(descriptor)
    try:
        job = _made(**pipe.recv())
    except Exception as error:
        pipe.send(("refused", str(error) if isinstance(error, ValueError) else described(error)))
        return
    pipe.send(("reply", None))
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            _alarm(request["seconds"])
            for reply in job(request["items"]):
                pipe.send(("reply", reply))
                _alarm(request["seconds"])
            pipe.send(("reply", None))
        except Exception as error:
            pipe.send(("failed", str(error) if type(error) is ValueError else described(error)))
        signal.alarm(0)


def _alarm(seconds: float) -> None:
    """Ends this process somewhat after the caller would have, in case the caller was killed meanwhile."""
    signal.alarm(math.ceil(seconds) + GRACE_SECONDS)


def _made(job: str, arguments: dict):
    module, name = job.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def described(error: BaseException) -> str:
    """What was raised, and the line of code that did."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
