"""Processes of a recipe: none is left behind, two recipes do not share a folder, and two real stages run, are interrupted, and go on."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from training import EOD, VOCAB

from engine.config import ConfigError
from engine.recipe import launcher
from engine.recipe.launcher import Job, folder_lock, progress_line, torchrun

ROOT = Path(__file__).parents[2]
# Stands for torchrun: starts a rank in a session of its own, says so, and waits. With `ends` it ends the rank when told to, as torchrun does.
FAKE = """
import os, signal, subprocess, sys
sleeper = "import signal; print('up', flush=True); signal.pause()"
rank = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
def leave(*_):
    if sys.argv[2] == "ends":
        rank.kill()
        os._exit(0)
signal.signal(signal.SIGTERM, leave)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {rank.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
while True:
    signal.pause()
"""
# Stands for recipe.py: runs the fake torchrun under the lock of a folder.
RECIPE = """
import sys
from pathlib import Path
from test_recipe_launcher import FakeJob
from engine.recipe.launcher import folder_lock, torchrun
folder = Path(sys.argv[1])
with folder_lock(folder) as lock:
    torchrun(FakeJob("x", "", folder, 1, [], folder / "output.log", [], 0, ("-c", FakeJob.FAKE, str(folder / "pids"), "ends")), lock)
"""


@dataclass(frozen=True)
class FakeJob(Job):
    arguments: tuple[str, ...] = ()
    FAKE = FAKE

    @property
    def command(self) -> list[str]:
        return [sys.executable, *self.arguments]


def job(folder: Path, *arguments: str) -> FakeJob:
    return FakeJob("x", "", folder, 1, [], folder / "output.log", [], 0, arguments)


def when_there(path: Path, act, seconds: float = 300) -> None:
    """Wait for a file that appears as a whole, then act(). Raises after `seconds`."""
    gone = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if path.exists():
            return act()
        gone.wait(0.05)
    raise AssertionError(f"{path} has not appeared in {seconds} s")


def processes(pids: Path) -> list[psutil.Process]:
    return [psutil.Process(int(pid)) for pid in pids.read_text().split()]


def all_gone(found: list[psutil.Process], seconds: float = 60) -> bool:
    """Do they all end within `seconds`? A zombie has ended; only its parent has not looked."""
    _, alive = psutil.wait_procs(found, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.parametrize("obeys", ["ends", "ignores"])
def test_an_interrupt_ends_torchrun_and_its_ranks(tmp_path, monkeypatch, obeys):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 20 if obeys == "ends" else 1)
    pids, found = tmp_path / "pids", []

    def interrupt():
        found.extend(processes(pids))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=when_there, args=(pids, interrupt))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        torchrun(job(tmp_path, "-c", FAKE, str(pids), obeys))
    thread.join()
    assert len(found) == 2 and all_gone(found, 5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells a child of its parent's death on Linux alone")
def test_a_kill_ends_torchrun_and_the_lock_outlives_the_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/recipe")])}
    recipe = subprocess.Popen([sys.executable, "-c", RECIPE, str(tmp_path)], env=environment, cwd=ROOT)
    found = []
    when_there(tmp_path / "pids", lambda: found.extend(processes(tmp_path / "pids")))
    with pytest.raises(ConfigError, match="another recipe.py, or ranks that one left, is at work in"), folder_lock(tmp_path, seconds=0):
        pass
    recipe.kill()
    recipe.wait()
    assert all_gone(found)
    with folder_lock(tmp_path, seconds=10):
        pass


def test_exit_codes_and_output(tmp_path):
    assert torchrun(job(tmp_path, "-c", "print('hello'); raise SystemExit(3)")) == 3
    assert torchrun(job(tmp_path, "-c", "print('again')")) == 0
    lines = (tmp_path / "output.log").read_text().splitlines()      # a resumed stage goes on in the same file
    assert [line for line in lines if line in ("hello", "again")] == ["hello", "again"] and lines[0].startswith("== ")


def test_progress_counts_over_the_rungs_of_a_ladder(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    made = Job("long", "pretrain.py", tmp_path, 1, [], tmp_path, folders, 40)
    assert progress_line(made) == ""
    for folder, steps in zip(folders, (10, 5)):
        folder.mkdir()
        lines = [{"step": i + 1, "loss": 2.5, "step_time_s": 3.0} for i in range(steps)]
        folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert progress_line(made) == "  long  15/40  loss 2.5000  left 1:15"


# --- two real stages ----------------------------------------------------------------------------------------------------------


def real_recipe(tmp_path, corpus) -> Path:
    run, log = {"device": "cpu", "seed": 11}, {"tensorboard": False, "every": 1}
    model = {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": VOCAB}
    data = {"train": [corpus["train"]], "valid": {"held_out": [corpus["valid"]]}, "eod_id": EOD}
    train = {"seq_len": 32, "global_batch": 4, "precision": "fp32", "eval_samples": 8}
    keys = {"run": run, "data": data, "log": log}
    base = {**keys, "stage": "pretrain", "model": model, "train": {**train, "steps": 80}, "optim": {"lr": 3e-3},
            "schedule": {"kind": "constant"}, "checkpoint": {"save_every": 40}}
    more = {**keys, "stage": "continued", "parallel": {"tp": 2}, "train": {**train, "steps": 4, "eval_at_start": True}, "optim": {"lr": 1e-3}}
    gates = [{"metric": "valid_loss", "measure": "kept", "at_most": 10.0},
             {"metric": "rise", "set": "boundary", "at_most": 0.5, "on_failure": "warn"}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "dir": str(tmp_path / "work"), "measures": {"kept": {"keys": {**keys, "stage": "continued", "train": {**train}}, "after": ["more"]}},
        "stages": {"base": {"keys": base}, "more": {"keys": more, "ranks": 2, "gates": gates}}}, sort_keys=False))
    return path


def test_two_stages_interrupted_and_resumed(tmp_path, corpus):
    command = [sys.executable, str(ROOT / "launch/recipe.py"), str(real_recipe(tmp_path, corpus)), "spike.window=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    found, work = [], tmp_path / "work"

    def interrupt():
        found.extend(psutil.Process(first.pid).children(recursive=True))
        first.send_signal(signal.SIGTERM)

    when_there(work / "base/checkpoints/iter_0000040", interrupt)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 1 and "interrupted; the same command goes on from here" in told and "Traceback" not in told
    assert len(found) >= 2 and all_gone(found, 5)      # torchrun and its rank
    assert json.loads((work / "state.json").read_text())["stages"]["base"]["status"] == "started"

    second = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "base (pretrain): 80 steps on 1 rank, resuming " in second.stdout and "more (continued): 4 steps on 2 ranks, from base" in second.stdout
    assert second.stdout.count("gate open") == 2 and "| more " in second.stdout
    losses = [json.loads(line) for line in (work / "base/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == list(range(1, 81))      # no step twice, none lost
    lineage = json.loads((work / "more/checkpoints/lineage.json").read_text())
    numbers, before = lineage["numbers"], lineage["boundary"]
    assert lineage["parents"]["load"]["stage"] == "base" and lineage["config"]["model"]["hidden_size"] == 32
    assert len(lineage["data"]) == 4 and lineage["packages"]["torch"]
    assert before["start_ratio"] == pytest.approx(1, abs=1e-5)      # the same weights on the same rows, on two ranks in place of one
    measured = json.loads((work / "state.json").read_text())["stages"]["more"]["measured"]["kept"]["numbers"]["valid_loss"]
    assert measured == pytest.approx(numbers["held_out/valid_loss"], abs=1e-5)
