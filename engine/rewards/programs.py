"""Programs in answers, judged by tests in a sandbox: the `code` part of a reward.

    judge = Programs("tests", seconds=10, memory_mib=1024)
    judge.score([("Write add.", "```python\\ndef add(a, b): return a + b\\n```", {"tests": "assert add(1, 2) == 3"})])      # [1.0]

The program is the last fenced block of an answer, or all of it. Its tests are Python source, or a list of [stdin, stdout] pairs; 1.0 is
for all of them passed, 0.0 for anything else. Tests run in a process of their own (inside.py says how they reach the program) and the
output of scripts is compared here, so nothing a program prints, raises, exits with or changes in its own process counts as a pass.
Every process is shut in by Linux namespaces (mount, pid, net, ipc, uts; user as well where we are not root), as nobody without
capabilities, with an empty /tmp, no network, no environment and limits of time, memory, file size and processes.
Left out: filters of system calls, other languages, programs of several processes or threads, credit for some of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MAX_WORKERS = 8
START_SECONDS = 60.0      # a busy machine may take its time to start a process; this is not the program's
PROBE = ("def one(): return 1", "assert one() == 1")
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
# A fixed hash seed gives sets one order; numpy starts no threads, which the limits forbid.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HOME": "/tmp"}


class SandboxError(RuntimeError):
    """A process could not be shut in."""


class ItemError(ValueError):
    """What is wrong with one item; number: its place in the list."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Programs:
    """The tests of each item are record[key]. Raises ValueError where namespaces are missing, unless allow_unsandboxed."""

    def __init__(self, key: str, seconds: float, memory_mib: int, workers: int = 0, allow_unsandboxed: bool = False) -> None:
        self.key, self.workers = key, workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        problem = probe()
        if problem and not allow_unsandboxed:
            raise ValueError(f"kind code runs programs of the model in Linux namespaces, which this machine does not give ({problem}); in a "
                             "container add --cap-add=SYS_ADMIN --security-opt seccomp=unconfined, on a host allow unprivileged user namespaces "
                             "(docs/rewards.md), or set allow_unsandboxed: true where nothing can be lost")
        self.sandbox = Sandbox(seconds, memory_mib, is_closed=not problem)

    def score(self, items: Sequence[tuple[str, str, dict]]) -> list[float]:
        """1.0 or 0.0 for each (prompt, answer, record), in order. Raises ItemError for tests that are none, SandboxError."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="programs") as threads:
            return list(threads.map(self._score, range(len(items)), items))

    def _score(self, number: int, item: tuple[str, str, dict]) -> float:
        _, answer, record = item
        source, tests = program_of(answer), record.get(self.key)
        try:
            if isinstance(tests, str) and tests.strip():
                return float(self.sandbox.passes(source, tests))
            return float(self.sandbox.prints(source, _pairs(tests)))
        except ValueError as error:
            raise ItemError(number, f"{self.key}: {error}") from None


def probe() -> str:
    """Why this machine cannot shut a process in; empty when it can."""
    try:
        return "" if Sandbox(START_SECONDS, 256).passes(*PROBE) else "a program in the sandbox does not answer its tests"
    except SandboxError as error:
        return str(error)


@dataclass(frozen=True)
class Sandbox:
    """Runs programs. seconds: for all runs of one answer, without the time to start them. memory_mib: of each process."""

    seconds: float
    memory_mib: int
    is_closed: bool = True
    """False: no namespaces; limits and a process group alone."""

    def passes(self, source: str, tests: str) -> bool:
        """Does the program pass all tests? Raises ValueError for tests that are no Python, SandboxError."""
        with contextlib.ExitStack() as stack:
            ends, verdict = socket.socketpair(), stack.enter_context(tempfile.TemporaryFile())
            with ends[0], ends[1]:      # closed here after the start, so that each side sees the other one go
                program, judge = ends[0].fileno(), ends[1].fileno()
                start = {"role": "program", "source": source, "channel": program}
                begun = stack.enter_context(self._process(start, [program]))
                start = {"role": "tests", "source": tests, "channel": judge, "verdict": verdict.fileno()}
                judging = stack.enter_context(self._process(start, [judge, verdict.fileno()]))
            begun.wait_until_ready()
            judging.wait(self.seconds)
            verdict.seek(0)
            found = json.loads(verdict.read() or b"{}")
        if "broken" in found:
            raise ValueError(f"the tests are no Python ({found['broken']}); mend them in the data")
        return found == {"passed": True}

    def prints(self, source: str, pairs: Sequence[Sequence[str]]) -> bool:
        """Does the program end well and print, for every stdin, the lines of its stdout? Raises SandboxError."""
        left = self.seconds
        for given, wanted in pairs:
            with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
                stdin.write(given.encode())
                stdin.seek(0)
                with self._process({"role": "main", "source": source}, [], stdin, stdout) as process:
                    left -= process.wait(left)
                stdout.seek(0)
                if left <= 0 or process.exit_code or _lines(stdout.read().decode("utf-8", "replace")) != _lines(wanted):
                    return False
        return True

    @contextlib.contextmanager
    def _process(self, job: dict, descriptors: Sequence[int], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) -> Iterator[_Process]:
        """A process of inside.py that plays a role. Whatever it does, in a closed sandbox nothing of it is left afterwards."""
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory(
                prefix="trireme-code-", ignore_cleanup_errors=True) as folder:
            packages = sysconfig.get_path("purelib")
            ready, sign = os.pipe()
            job = {**job, "ready": sign, "root": folder if self.is_closed else "", "visible": _visible(packages), "packages": [packages],
                   "memory_mib": self.memory_mib, "seconds": self.seconds}
            file.write(json.dumps(job).encode())
            file.seek(0)
            command = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", str(Path(__file__).with_name("inside.py")), str(file.fileno())]
            try:
                popen = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdin=stdin, stdout=stdout, stderr=errors, start_new_session=True,
                                         pass_fds=[file.fileno(), sign, *descriptors])
            finally:
                os.close(sign)
            process = _Process(popen, ready, errors, self.is_closed)
            try:
                yield process
            finally:
                process.kill()
                os.close(ready)


class _Process:
    """The parent's side of one process."""

    def __init__(self, popen: subprocess.Popen, ready: int, errors, is_closed: bool) -> None:
        self._popen, self._ready, self._errors, self._is_closed = popen, ready, errors, is_closed

    @property
    def exit_code(self) -> int | None:
        return self._popen.returncode

    def wait_until_ready(self) -> None:
        """Until it is shut in and about to run what it was given. Raises SandboxError."""
        if not select.select([self._ready], [], [], START_SECONDS)[0]:
            raise SandboxError(f"a process did not start within {START_SECONDS:g} s; the machine is overloaded, set workers to fewer")
        if os.read(self._ready, 1):
            return
        words = os.pread(self._errors.fileno(), 4096, 0).decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxError("".join(words) or "a process ended before it was ready")

    def wait(self, seconds: float) -> float:
        """The seconds it ran, once it was ready; at the limit it is killed. Raises SandboxError."""
        self.wait_until_ready()
        start = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        self.kill()
        return time.monotonic() - start

    def kill(self) -> None:
        if self._is_closed:
            self._popen.terminate()      # inside.py's outer process kills process 1, and with it all others
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def program_of(answer: str) -> str:
    """The last fenced block of an answer, or all of it where there is none."""
    blocks = FENCE.findall(answer)
    return blocks[-1] if blocks else answer


def _pairs(tests) -> list[list[str]]:
    is_pairs = isinstance(tests, list) and tests and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in tests)
    if not is_pairs:
        raise ValueError("it holds no tests; give Python source, or a list of [stdin, stdout] pairs of strings")
    return tests


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _visible(packages: str) -> list[str]:
    """Folders and links that a Python needs: the system's libraries, its own and its packages."""
    found = [path for path in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin") if os.path.lexists(path)]
    for path in (os.path.realpath(sys.base_prefix), os.path.realpath(packages)):
        if not any(path == other or path.startswith(other + "/") for other in found):
            found.append(path)
    return found
