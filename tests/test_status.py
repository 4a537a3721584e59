"""launch/status.py: run folders read from outside, without torch and without the ranks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import status

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_dir(tmp_path):
    """A run of 40 steps after its 12th, under Slurm."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 40}\n")
    (folder / "env.json").write_text(json.dumps({"slurm": {"job": "123", "restarts": 2, "nodes": "n[1-2]"}}))
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 10, "reason": ""}))
    lines = [{"step": step, "loss": 5 - step / 10, "tokens_per_s": 1234.5} for step in range(1, 13)]
    lines.append({"step": 12, "split": "held_out", "valid_loss": 4.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "lo')
    (folder / "logs" / "rank_00001.log").write_text("".join(f"line {i}\n" for i in range(30)))
    return folder


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """squeue(answer): the only squeue on PATH prints that."""
    (tmp_path / "bin").mkdir()

    def squeue(answer: str) -> None:
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho {answer}\n")
        (tmp_path / "bin" / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    return squeue


def test_a_row_says_where_a_run_is(run_dir, squeue):
    squeue("PENDING")
    now = (run_dir / "metrics.jsonl").stat().st_mtime + 90
    row = status.row(run_dir, now)
    assert row["age"] <= 90.1      # of the younger of two files that were written together
    assert {**row, "age": None} == {"run": str(run_dir), "state": "running", "reason": "", "step": 12, "steps": 40, "loss": 3.8, "tokens_per_s": 1234.5,
                                    "age": None, "job": "123", "queue": "PENDING", "restarts": 2}
    head, line = status.table([row]).splitlines()
    assert head.split() == ["run", "state", "step", "loss", "tokens/s", "age", "job", "restarts"]
    assert line.split() == [str(run_dir), "running", "12/40", "3.8000", "1,234", "0:01:30", "123", "PENDING", "2"]


def test_a_reason_has_a_line_of_its_own(run_dir, squeue):
    squeue("")
    (run_dir / "status.json").write_text(json.dumps({"state": "failed", "step": 12, "reason": "the loss is nan"}))
    assert status.table([status.row(run_dir)]).splitlines()[2] == f"{run_dir}: the loss is nan"


def test_restarts_are_those_of_the_latest_series_or_supervisor(run_dir, squeue):
    squeue("")
    (run_dir / "slurm").mkdir()
    begins = [{"event": "begin", "series": series} for series in ("a", "a", "a", "b", "b")]
    (run_dir / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in begins))
    assert status.row(run_dir)["restarts"] == 1
    (run_dir / "env.json").write_text("{}")
    assert status.row(run_dir)["restarts"] is None
    (run_dir / "logs" / "supervisor.jsonl").write_text('{"event": "launch", "launch": 4}\n{"event": "exit"}\n')
    assert status.row(run_dir)["restarts"] == 3


def test_a_run_before_its_first_step(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 0, "reason": ""}))
    row = status.row(tmp_path)
    assert (row["step"], row["steps"], row["loss"], row["job"], row["restarts"]) == (0, None, None, None, None)
    assert status.table([row])


def test_the_last_line_is_found_in_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0, "padding": "x" * 1000}) + "\n" for step in range(1, 200)))
    assert status.last_record(path)["step"] == 199


def test_a_log_is_followed_into_a_new_start(run_dir):
    log = status.rank_log(run_dir, 1)
    seen, came = [], threading.Condition()

    class Enough(Exception):
        pass

    def show(line: str) -> None:
        with came:
            seen.append(line)
            came.notify()
        if line == "end":
            raise Enough

    def follow():
        with pytest.raises(Enough):
            status.follow(log, show, num_lines=2, pause=0.01)

    def wait_for(line: str) -> None:
        with came:
            assert came.wait_for(lambda: line in seen, timeout=20)

    thread = threading.Thread(target=follow)
    thread.start()
    wait_for("line 29")
    with open(log, "a") as file:
        file.write("whole\nha")
        file.flush()
        wait_for("whole")
        file.write("lf\n")
        file.flush()
        wait_for("half")
    log.write_text("anew\nend\n")
    thread.join(timeout=20)
    assert seen == ["line 28", "line 29", "whole", "half", "anew", "end"]


def test_the_command(run_dir, tmp_path):
    def command(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(ROOT / "launch/status.py"), *args], capture_output=True, text=True,
                              env={**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)})

    (tmp_path / "rung_1").mkdir()
    run_dir.rename(tmp_path / "rung_1" / "deep")
    done = command(str(tmp_path / "rung_1"), "--json")
    assert done.returncode == 0 and [row["step"] for row in json.loads(done.stdout)] == [12], done.stderr
    done = command(str(tmp_path))
    assert done.returncode == 1 and "is no run folder: it has no status.json" in done.stderr and "Traceback" not in done.stderr
    done = command(str(tmp_path / "rung_1" / "deep"), "--tail", "7")
    assert done.returncode == 1 and "there is no" in done.stderr
