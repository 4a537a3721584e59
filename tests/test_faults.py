"""What a run is asked from outside, and what goes wrong inside a step. docs/faults.md, table Steps, has the figures.

Faults that end a process are met by processes of their own; the others on ranks that stay up.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import ranks
from omegaconf import OmegaConf
from training import merged, on_ranks

ROOT = Path(__file__).parents[1]


def status(raw) -> dict:
    return json.loads(Path(raw["run"]["dir"], "status.json").read_text())


def checkpoints(raw) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(raw["run"]["dir"], "checkpoints").glob("iter_*") if path.suffix == "")


def column(lines, name) -> list:
    return [line[name] for line in lines]


def meddled(meddle, act):
    """act() while meddle(model, number) is called after each forward and backward pass, counted from 1."""
    from engine.mcore.run import ParallelModel

    honest, count = ParallelModel.forward_backward, itertools.count(1)

    def forward_backward(self, micro_batches):
        result = honest(self, micro_batches)
        return meddle(self, next(count), result) or result

    ParallelModel.forward_backward = forward_backward
    try:
        return act()
    finally:
        ParallelModel.forward_backward = honest


def command_line(path, meddle, *args):
    """On a rank: the exit code of launch/pretrain.py with this configuration."""
    from engine import cli
    from engine.stages import TEXT

    sys.argv = ["pretrain.py", path]
    return meddled(partial(meddle, *args), lambda: cli.main("", TEXT))


def leave_alone(model, step, result):
    pass


@pytest.fixture
def start(tmp_path):
    """start(num_ranks, raw, meddle, *args) -> exit codes of the ranks."""

    def start(num_ranks, raw, meddle=leave_alone, *args):
        path = tmp_path / "run.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        return ranks.run(num_ranks, command_line, str(path), meddle, *args)

    return start


# --- what a run is asked from outside ----------------------------------------------------------------------------------


def signal_to_one_rank(number, rank, at, model, step, result):
    if step == at and os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_asks_for_another_start(raw_run, tmp_path, start, number):
    expected = on_ranks(2, merged(raw_run, {"run": {"dir": str(tmp_path / "unbroken")}}))
    before = signal.getsignal(number)
    assert start(2, raw_run, signal_to_one_rank, number, 1, 3) == [75, 75]
    assert checkpoints(raw_run) == [3] and signal.getsignal(number) == before
    assert status(raw_run) == {**status(raw_run), "state": "requeue", "step": 3, "reason": f"{number.name} came"}
    assert start(2, raw_run) == [0, 0] and status(raw_run)["state"] == "done"
    from engine.log import read_metrics

    assert column(read_metrics(raw_run["run"]["dir"]), "loss") == column(expected, "loss")


def test_a_signal_after_the_last_step_changes_nothing(raw_run, start):
    assert start(2, raw_run, signal_to_one_rank, signal.SIGTERM, 0, 6) == [0, 0]
    assert status(raw_run)["state"] == "done"


def touch(path, at, model, step, result):
    if step == at and os.environ["RANK"] == "0":
        Path(path).touch()


def test_a_file_asks_for_a_checkpoint(raw_run, start):
    file = Path(raw_run["run"]["dir"], "SAVE")
    assert start(2, raw_run, touch, str(file), 2) == [0, 0]
    assert checkpoints(raw_run) == [2, 6] and not file.exists()


def test_a_file_stops_the_run(raw_run, start):
    file = Path(raw_run["run"]["dir"], "STOP")
    raw = merged(raw_run, {"checkpoint": {"save_at_end": False}})
    assert start(2, raw, touch, str(file), 2) == [0, 0]
    assert checkpoints(raw) == [2] and status(raw) == {**status(raw), "state": "stopped", "step": 2, "reason": f"{file} was there"}
    assert file.exists()
    assert start(2, raw) == [0, 0]      # started again, it goes on to the end
    assert not file.exists() and status(raw) == {**status(raw), "state": "done", "step": 6}


# --- processes of their own --------------------------------------------------------------------------------------------


def wait_for(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_steps(raw, number):
    path = Path(raw["run"]["dir"], "metrics.jsonl")
    return path.exists() and path.read_bytes().count(b"\n") >= number


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(raw) -> a torchrun of two ranks. Whatever is left of it is killed in the end."""
    family = []

    def torchrun(raw):
        (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "launch" / "pretrain.py"), "run.yaml"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        family.append(psutil.Process(process.pid))
        return process

    yield torchrun
    for process in [one for parent in family if parent.is_running() for one in [parent, *parent.children(recursive=True)]]:
        process.kill()


def test_ranks_whose_launcher_dies_save_and_leave(raw_run, torchrun):
    """As Slurm's --signal=USR1 does it to a plain torchrun, which dies of it and tells its ranks nothing."""
    raw = merged(raw_run, {"train": {"steps": 100000, "eval_samples": 0}, "schedule": {"kind": "constant", "warmup_steps": 0}})
    launcher = torchrun(raw)
    wait_for(lambda: has_steps(raw, 3))
    ranks_of_it = [one for one in psutil.Process(launcher.pid).children(recursive=True) if "pretrain.py" in " ".join(one.cmdline())]
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(30) == -signal.SIGUSR1
    gone, left = psutil.wait_procs(ranks_of_it, 60)
    assert len(gone) == 2 and not left
    assert status(raw) == {**status(raw), "state": "requeue", "reason": "SIGTERM came"}
    assert checkpoints(raw) == [status(raw)["step"]]
