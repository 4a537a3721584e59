"""The run folder as a supervisor sees it: where it is, how far the run has come, what an earlier supervisor left, and the log of events.

    folder = run_dir(["pretrain.yaml", "run.dir=runs/a"])      # without validating the rest, which the ranks do
    with Lock(folder / "logs", node=0) as lock:
        await lock.take(seconds=300)                           # ends ranks of a supervisor that was killed
        Events(folder / "logs", console).write("launch", "2 ranks started", launch=1)

Left out: checkpoints; a run finds its newest verified one by itself.
"""

import asyncio
import contextlib
import datetime
import fcntl
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

from engine.supervise.console import STDERR, Console

END_OF_METRICS = 1 << 16  # bytes of metrics.jsonl that hold its last lines


class UsageError(ValueError):
    """What the person who starts a supervisor must mend."""


def run_dir(arguments: Sequence[str]) -> Path:
    """run.dir of CONFIG.yaml and key=value overrides. Raises UsageError where there is none."""
    config = next((word for word in arguments if "=" not in word), None)
    if config is None:
        raise UsageError("no CONFIG.yaml after the program; see launch/supervise.py --help")
    found = [word.removeprefix("run.dir=") for word in arguments if word.startswith("run.dir=")]
    value = found[-1] if found else _run_dir_of(Path(config))
    if not isinstance(value, str) or not value:
        raise UsageError(f"{config} names no run.dir, which is where the ranks' output goes; set it there or as run.dir=FOLDER")
    if "${" in value:  # OmegaConf's interpolation, which a supervisor seldom needs and which takes a quarter of a second to import
        from engine.config import ConfigError, read_yaml

        try:
            value = read_yaml(Path(config), [word for word in arguments if word != config])["run"]["dir"]
        except ConfigError as error:
            raise UsageError(str(error)) from None
    return Path(value)


def _run_dir_of(config: Path):
    try:
        raw = yaml.safe_load(config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{config} cannot be read: {error}") from None
    section = raw.get("run") if isinstance(raw, dict) else None
    return section.get("dir") if isinstance(section, dict) else None


def steps_taken(folder: Path) -> int:
    """Steps that metrics.jsonl has; of a run that is a ladder of runs, of all its rungs together."""
    return sum(_last_step(path) for pattern in ("metrics.jsonl", "*/metrics.jsonl") for path in folder.glob(pattern))


def _last_step(metrics: Path) -> int:
    with open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - END_OF_METRICS))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be cut off
            return int(json.loads(line)["step"])
    return 0


class Events:
    """One JSON line per event in logs/supervisor.jsonl (supervisor_0001.jsonl on node 1), and a line on stderr for a person."""

    def __init__(self, logs: Path, console: Console, node: int = 0, num_nodes: int = 1):
        self._console, self._node, self._who = console, node, "supervisor" if num_nodes == 1 else f"supervisor {node}"
        self._file = open(logs / (f"supervisor_{node:04d}.jsonl" if node else "supervisor.jsonl"), "a", encoding="utf-8")

    def write(self, event: str, text: str, **fields) -> None:
        """fields: what a program may want to know of it."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now, "node": self._node, "event": event, **fields, "text": text}) + "\n")
        self._file.flush()
        self._console.say(STDERR, f"{self._who}: {text}\n")


class Lock:
    """Held by the supervisor of a node and by every rank it starts, so that two do not write one run folder.

    The file says who holds it, so that ranks whose supervisor was killed can be ended by the next one.
    """

    def __init__(self, logs: Path, node: int, events: Events):
        self._file = open(logs / f"supervisor_{node:04d}.lock", "a+", encoding="utf-8")
        self._events = events

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    @property
    def descriptor(self) -> int:
        """For the ranks to inherit."""
        return self._file.fileno()

    async def take(self, seconds: float) -> None:
        """Wait until the ranks of an earlier supervisor are gone: they are told to save, and killed after `seconds`.

        Raises UsageError when another supervisor is at work in this folder.
        """
        told, killed, deadline = False, False, asyncio.get_running_loop().time() + seconds
        while not self._is_free():
            holder = self._holder()
            if _is_alive(holder.get("supervisor")) or holder.get("host", socket.gethostname()) != socket.gethostname():
                raise UsageError(f"a supervisor (process {holder['supervisor'][0]} of {holder['host']}) is at work in {Path(self._file.name).parents[1]}; "
                                 "end it first, or choose another run.dir")
            if holder and not told:
                self._events.write("leftover", "waiting for ranks that an earlier supervisor left to save and leave", ranks=holder.get("ranks", []))
                _signal(holder, signal.SIGTERM)
                _signal(holder, signal.SIGCONT)  # one that was stopped hears SIGTERM only now
                told = True
            if not killed and asyncio.get_running_loop().time() > deadline:
                self._events.write("kill", f"they have not left in {seconds:g} s, so they are killed")
                _signal(holder, signal.SIGKILL)
                killed = True
            await asyncio.sleep(0.1)  # the kernel has no event for a free lock that does not block

    def describe(self, pids: Sequence[int]) -> None:
        """Write who holds it: this process and these ranks."""
        self._file.seek(0)
        self._file.truncate()
        holder = {"host": socket.gethostname(), "supervisor": _identity(os.getpid()), "ranks": [_identity(pid) for pid in pids]}
        self._file.write(json.dumps(holder))
        self._file.flush()

    def _is_free(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.describe([])
        return True

    def _holder(self) -> dict:
        self._file.seek(0)
        try:
            return json.loads(self._file.read())
        except ValueError:  # being written
            return {}


def _identity(pid: int) -> tuple[int, float | None]:
    """A process id and its time of birth, since ids come again."""
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return pid, None


def _is_alive(identity) -> bool:
    try:
        process = psutil.Process(identity[0])
        return process.create_time() == identity[1] and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, TypeError):
        return False


def _signal(holder: dict, what: int) -> None:
    """To the ranks of a holder. SIGKILL goes to all that they started, too."""
    for identity in holder.get("ranks", []):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if what == signal.SIGKILL and (_is_alive(identity) or not psutil.pid_exists(identity[0])):
                os.killpg(identity[0], what)
            elif _is_alive(identity):
                os.kill(identity[0], what)
