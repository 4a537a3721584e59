"""Real jobs on a real Slurm: cut by their time limit, cancelled, killed, stopped, started on a bad node; make slurm-test.

Two ranks on two nodes, each node this same machine. What a broken run computes is compared with an unbroken one, bit for bit. Takes minutes, since
Slurm's shortest time limit is one; `make test` leaves it out.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, missing
from omegaconf import OmegaConf
from training import merged, small_run

from engine.log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 300
pytestmark = pytest.mark.skipif("TRIREME_SLURM" not in os.environ, reason="make slurm-test runs these")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.fail(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class Run:
    """A run of 300 steps under Slurm, submitted by launch/slurm/job.py. pace: seconds that a step of the first start sleeps."""

    def __init__(self, cluster: Cluster, corpus, folder: Path, pace: float = 0.0, save_every: int = 20, **slurm):
        self.cluster, self.dir = cluster, folder / "run"
        section = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "cpu_bind": "", "time_limit_hours": 0.5, "max_restarts": 1,
                   "env": {"PACE_SECONDS": str(pace)}, "check": {"enabled": False}}
        raw = merged(small_run(corpus, folder), {"stage": "tests.slurm.paced:Paced", "train": {"steps": STEPS}, "checkpoint": {"save_every": save_every},
                                                 "slurm": merged(section, slurm)})
        config = folder / "run.yaml"
        config.write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        command = [sys.executable, str(ROOT / "launch/slurm/job.py"), str(config), "--submit"]
        done = subprocess.run(command, env={**cluster.env, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.job = re.match(r"submitted (\d+)", done.stdout)[1]

    def reach(self, step: int) -> None:
        """Wait until a step was trained and logged."""
        self.cluster.until(lambda: self.dir.joinpath("metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(self.dir)),
                           f"step {step}", 240)

    def ended(self) -> tuple[str, str]:
        """(Slurm's state, that of status.json) at the end; every rank is gone by then."""
        state = self.cluster.ended(self.job, 420)
        assert not [pid for log in self.dir.glob("logs/rank_*.log") for pid in self.pids(log) if psutil.pid_exists(pid)]
        return state, json.loads((self.dir / "status.json").read_text())["state"]

    @staticmethod
    def pids(log: Path) -> list[int]:
        return [int(pid) for pid in re.findall(r"process (\d+)$", log.read_text(), re.M)]

    @property
    def output(self) -> str:
        """What the job script has written."""
        return (self.dir / "slurm" / f"{self.job}.out").read_text()

    @property
    def verdicts(self) -> list[str]:
        lines = map(json.loads, (self.dir / "slurm" / "attempts.jsonl").read_text().splitlines())
        return [line["verdict"] for line in lines if line["event"] == "end"]

    def result(self) -> tuple[list, dict[str, bytes]]:
        """Losses of all steps and the weights after the last."""
        from engine.mcore.checkpoint import read_tensors

        losses = [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(self.dir)]
        return losses, {name: tensor.numpy().tobytes() for name, tensor in read_tensors(self.dir).items()}


@pytest.fixture
def start(cluster, corpus, tmp_path):
    """start(pace, save_every, **slurm) -> Run."""
    return functools.partial(Run, cluster, corpus, tmp_path)


@pytest.fixture(scope="module")
def unbroken(cluster, corpus, tmp_path_factory):
    run = Run(cluster, corpus, tmp_path_factory.mktemp("unbroken"))
    assert run.ended() == ("COMPLETED", "done"), run.output
    assert run.verdicts == ["done"]
    return run.result()


def test_a_run_cut_by_its_time_limit_requeues_itself_and_ends_as_an_unbroken_one(start, unbroken):
    run = start(0.5, time_limit_hours=2 / 60, save_seconds=5, check={"enabled": True})
    assert run.ended() == ("COMPLETED", "done"), run.output
    *before, last = run.verdicts
    assert last == "done" and before and set(before) == {"requeue"}
    assert "requeue; saved and asked for a requeue (SIGUSR1 came)" in run.output and "check of the nodes: 2 nodes sound" in run.output
    assert run.result() == unbroken


def test_a_rank_that_is_killed_brings_the_job_back(start, unbroken):
    run = start(0.2, save_every=100)
    run.reach(110)
    (killed,) = run.pids(run.dir / "logs" / "rank_00001.log")
    os.kill(killed, signal.SIGKILL)
    assert run.ended() == ("COMPLETED", "done"), run.output
    assert run.verdicts == ["requeue", "done"] and "attempt 2, newest checkpoint at step 100" in run.output
    assert run.result() == unbroken


def test_a_job_that_gets_nowhere_is_given_up(start):
    run = start(0.5, max_restarts=0)
    run.reach(2)
    (killed,) = run.pids(run.dir / "logs" / "rank_00000.log")
    os.kill(killed, signal.SIGKILL)
    assert run.ended()[0] == "FAILED"
    assert run.verdicts == ["gave up"] and "no newer checkpoint after 0 restarts (slurm.max_restarts)" in run.output


def test_a_cancelled_job_has_saved_and_stays_away(start):
    run = start(0.5)
    run.reach(3)
    run.cluster.command("scancel", run.job)
    assert run.ended() == ("CANCELLED", "requeue")
    assert run.verdicts == ["cancelled"] and run.cluster.job(run.job)["Restarts"] == "0"
    assert list(run.dir.glob("checkpoints/iter_*/metadata.json"))


def test_a_stop_file_ends_the_job(start):
    run = start(0.5)
    run.reach(3)
    (run.dir / "STOP").touch()
    assert run.ended() == ("COMPLETED", "stopped")
    assert run.verdicts == ["stopped"]


def test_a_bad_node_is_named_and_left_out_of_the_next_start(start, unbroken, tmp_path):
    """The second node sees run.dir read-only, through a Python that runs in a mount namespace of its own there."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
[ "$SLURMD_NODENAME" = n2 ] || exec {sys.executable} "$@"
exec unshare --mount sh -c 'mount --bind {tmp_path}/run {tmp_path}/run && mount -o remount,bind,ro {tmp_path}/run && exec {sys.executable} "$@"' sh "$@"
""")
    python.chmod(0o755)
    run = start(python=str(python), check={"enabled": True})
    assert run.ended() == ("COMPLETED", "done"), run.output
    assert run.verdicts == ["requeue", "done"]
    assert re.search(r"check of the nodes: n2: .*/run cannot be written: .*Read-only file system", run.output) and "excluded n2" in run.output
    job = run.cluster.job(run.job)
    assert job["ExcNodeList"] == "n2" and job["NodeList"] == "n[1,3]"
    assert run.result() == unbroken
