"""A run that meets a random fault about every 20 s for ten minutes, and nobody looks after it: goodput, and is it bit-equal to a quiet one?

Two ranks train a small model under launch/supervise.py, which is started again when it ends with 75 or is killed, as a system's service manager
would. A case is a fault, 10 to 30 s after the one before, wherever the run happens to be: in a step, in a save, while ranks start. Where a start
takes longer than 10 s pauses are longer in proportion, or the run would never come to anything. Then RUN/STOP ends it, another one goes as far
without faults, and the two are compared: every line of metrics.jsonl but for times and memory, and every weight of the last checkpoint that both
have. Where a person would be needed (the supervisor gives up) the campaign has failed.

Goodput is the time of the steps that count, each once, in the time of the whole. A start takes several seconds of both cores of a small machine,
so with a fault every 20 s it says more about starting than about training.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

from engine.supervise.folder import steps_taken
from engine.supervise.restarts import REQUEUE

ROOT = Path(__file__).resolve().parents[1]
CASES, EVERY, STARTS = 30, 20.0, 2.0  # faults; seconds between two, but no less than so many starts
TRACKER = "latest_checkpointed_iteration.txt"
NUM_RANKS, STEPS = 2, 100_000  # more steps than there is time for
TIMES = {"step_time_s", "tokens_per_s", "tflops_per_device", "data_wait_s", "peak_memory_gib"}
SETTINGS = {
    "run": {"timeout_minutes": 1},  # a rank that is stopped while it starts is found by this
    "model": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256}, "parallel": {"zero1": True}, "schedule": {"kind": "constant"},
    "train": {"steps": STEPS, "seq_len": 128, "global_batch": 16, "micro_batch": 8, "eval_every": 100, "eval_samples": 16},
    "checkpoint": {"save_every": 25, "keep_last": 4, "keep_every": 500}, "faults": {"hang_seconds": 10}, "log": {"every": 25},
}


def run(cases: int, seed: int) -> int:
    rng, cases, faults = random.Random(seed), cases or CASES, Counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        config = _configuration(work)
        soaked, started = Service(config, work / "soaked"), time.monotonic()
        soaked.watch(until=lambda: soaked.start_seconds)
        every = max(EVERY, STARTS * soaked.start_seconds[0])
        for _ in range(cases):
            soaked.watch(rng.uniform(0.5 * every, 1.5 * every))
            fault = rng.choice(FAULTS)
            faults[fault.__name__ if fault(soaked, rng) else "too early for one"] += 1
        furthest = soaked.steps
        soaked.watch(until=lambda: soaked.steps > furthest)  # over the last of them
        soaked.stop()
        seconds = time.monotonic() - started
        quiet = Service(config, work / "quiet")
        quiet.watch(until=lambda: quiet.steps >= soaked.steps)
        quiet.stop()
        good = sum(line["step_time_s"] for line in _lines(soaked.folder) if "split" not in line)
        problems = _differences(soaked.folder, quiet.folder)
        starts = [event for event in soaked.events() if event["event"] == "launch"]
        met = ", ".join(f"{n} {name}" for name, n in faults.most_common())
        print(f"| soak, seed {seed} | {cases} faults in {seconds / 60:.1f} min, one in {every:.0f} s: {met} |")
        print(f"| | ranks started {len(starts)} times, the supervisor {soaked.num_starts} times; {soaked.steps} steps, {soaked.num_repeated} repeated |")
        start = statistics.median(soaked.start_seconds)
        print(f"| | goodput {100 * good / seconds:.0f}%; {start:.1f} s from the start of ranks to their first step (median) |")
        print(f"| | {soaked.num_given_up} manual actions; against the quiet run: {'; '.join(problems) or 'bit-equal'} |")
    return int(bool(problems or soaked.num_given_up))


class Service:
    """A supervised run that is started again whenever it ends without being done, and watched."""

    def __init__(self, config: Path, folder: Path):
        self.folder, self.process, self.num_starts, self.num_given_up = folder, None, 0, 0
        self.command = [sys.executable, ROOT / "launch/supervise.py", "--nproc-per-node", str(NUM_RANKS), "--requeue-here", "--max-restarts", "10",
                        "--grace-seconds", "3", "--stop-seconds", "60", ROOT / "launch/pretrain.py", config, f"run.dir={folder}"]
        self.steps = self.num_repeated = 0
        self.start_seconds, self._launch, self._launched = [], [], 0.0

    def watch(self, seconds: float = 3600, until=lambda: False) -> None:
        """For so long, or until something is so, or the run is done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until() and self._is_up():
            self._look()
            time.sleep(0.05)

    def stop(self) -> None:
        """By RUN/STOP, which a run that only starts removes."""
        self.watch(until=lambda: (self.folder / "STOP").touch() if self.folder.exists() else None)
        self._look()

    def ranks(self) -> list[psutil.Process]:
        """Those of the launch underway."""
        try:
            holder = json.loads((self.folder / "logs/supervisor_0000.lock").read_text())
            return [process for pid, born in holder["ranks"] for process in [psutil.Process(pid)] if process.create_time() == born]
        except (OSError, ValueError, psutil.NoSuchProcess):
            return []

    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.folder / "checkpoints").glob("iter_*") if path.suffix == "")

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "logs/supervisor.jsonl").read_text().splitlines()]

    def _is_up(self) -> bool:
        """Start the supervisor where it does not run; False when it has ended the run."""
        code = self.process.poll() if self.process else REQUEUE
        if code == 0:
            return False
        if code is not None:
            self.num_given_up += code > 0 and code != REQUEUE
            with open(self.folder.with_suffix(".console"), "ab") as console:
                self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=console, stderr=console, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.num_starts += 1
        return True

    def _look(self) -> None:
        """How far the run is. It has gone back where the metrics have."""
        steps, now, launch = steps_taken(self.folder), time.monotonic(), [rank.pid for rank in self.ranks()]
        if launch and launch != self._launch:
            self._launch, self._launched = launch, now
        if steps > self.steps and self._launched:
            self.start_seconds.append(now - self._launched)
            self._launched = 0.0
        self.num_repeated += max(0, self.steps - steps)
        self.steps = steps


# --- faults: each returns whether it could be done -------------------------------------------------------------------


def kill_a_rank(service: Service, rng) -> bool:
    return _signal(_one(service, rng), signal.SIGKILL)


def kill_all_ranks(service: Service, rng) -> bool:
    return _signal(service.ranks(), signal.SIGKILL)


def stop_a_rank(service: Service, rng) -> bool:
    return _signal(_one(service, rng), signal.SIGSTOP)


def SIGTERM_to_a_rank(service: Service, rng) -> bool:
    return _signal(_one(service, rng), signal.SIGTERM)


def SIGTERM(service: Service, rng) -> bool:
    return _signal([psutil.Process(service.process.pid)], signal.SIGTERM)


def SIGUSR1(service: Service, rng) -> bool:
    return _signal([psutil.Process(service.process.pid)], signal.SIGUSR1)


def kill_the_supervisor(service: Service, rng) -> bool:
    return _signal([psutil.Process(service.process.pid)], signal.SIGKILL)


def damage_the_newest_checkpoint(service: Service, rng) -> bool:
    """One bit, a cut or a loss in one of its files; then a rank is killed, so that it matters."""
    if len(service.checkpoints()) < 2:
        return False
    try:
        path = rng.choice(sorted(path for path in service.checkpoints()[-1].rglob("*") if path.is_file()))
        whole, kind = path.read_bytes(), rng.choice(("flip", "cut", "remove"))
        if kind == "remove":
            path.unlink()
        else:
            at = rng.randrange(len(whole))
            path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1:] if kind == "flip" else b""))
    except (OSError, IndexError):  # a newer one is there, and this one is being deleted
        return False
    return kill_a_rank(service, rng)


def garbage_in_the_tracker(service: Service, rng) -> bool:
    if not service.checkpoints():
        return False
    (service.folder / "checkpoints" / TRACKER).write_bytes(rng.randbytes(rng.randrange(20)))
    return kill_a_rank(service, rng)


def kill_a_rank_in_a_save(service: Service, rng) -> bool:
    service.watch(EVERY, until=lambda: any((service.folder / "checkpoints").glob("iter_*.tmp")))
    return kill_a_rank(service, rng)


FAULTS = (kill_a_rank, kill_all_ranks, stop_a_rank, SIGTERM_to_a_rank, SIGTERM, SIGUSR1, kill_the_supervisor, damage_the_newest_checkpoint,
          garbage_in_the_tracker, kill_a_rank_in_a_save)


def _one(service: Service, rng) -> list[psutil.Process]:
    ranks = service.ranks()
    return [rng.choice(ranks)] if ranks else []


def _signal(processes: list[psutil.Process], number: int) -> bool:
    try:
        for process in processes:
            process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return bool(processes)


# --- the run, and how two of them differ -----------------------------------------------------------------------------


def _configuration(work: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from training import merged, small_run, write_corpus

    corpus = {"train": write_corpus(work / "train", 2000), "valid": write_corpus(work / "valid", 100, seed=1)}
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(merged(small_run(corpus, work), SETTINGS)))
    return path


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _differences(soaked: Path, quiet: Path) -> list[str]:
    """In what the runs have in common, which must be all of the first."""
    import numpy as np

    from engine.mcore.checkpoint import read_tensors

    problems = []
    ours, theirs = ([{key: value for key, value in line.items() if key not in TIMES} for line in _lines(folder)] for folder in (soaked, quiet))
    if ours != theirs[:len(ours)]:
        first = next(a for a, b in zip(ours, [*theirs, *[None] * len(ours)]) if a != b)
        problems.append(f"metrics.jsonl differs from step {first['step']} on")
    names = [{path.name for path in (folder / "checkpoints").glob("iter_*") if path.suffix == ""} for folder in (soaked, quiet)]
    common = sorted(names[0] & names[1])
    if not common:
        return [*problems, "no checkpoint in common"]
    ours, theirs = (read_tensors(folder / "checkpoints" / common[-1]) for folder in (soaked, quiet))
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    return problems + ([f"{len(different)} tensors of {common[-1]} differ"] if different else [])
