"""The supervisor: on stubs of ranks (rank_stub.py), which start in a tenth of a second, and at the end on real ones.

Left out: what a rank does when it hears a signal or hangs (test_faults.py).
"""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from training import merged, on_ranks

from engine.supervise.folder import UsageError, run_dir, steps_taken
from engine.supervise.ranks import Place
from engine.supervise.restarts import ERROR, OK, REQUEUE, USAGE, Restarts, judge

ROOT = Path(__file__).parents[1]
STUB = ROOT / "tests" / "rank_stub.py"
TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells a child of its parent's death on Linux alone")


# --- what needs no process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes, told, code", [
    ([0, 0], [], OK),
    ([75, 75], [], REQUEUE),
    ([75, 75], [TERM], REQUEUE),
    ([75, 0], [], REQUEUE),
    ([-KILL, 1], [], ERROR),
    ([1, 0], [], ERROR),
    ([2, 2], [], USAGE),
    ([2, -KILL], [], USAGE),
    ([75, 1], [], ERROR),          # a rank failed while all saved, and nobody asked them to end
    ([75, 1], [TERM], REQUEUE),    # it failed on its way out
    ([-TERM, 1], [TERM], REQUEUE),  # only starting
    ([-TERM, 1], [USR1], ERROR),
    ([-KILL, -KILL], [TERM], ERROR),  # did not leave in time
    ([0, None], [], ERROR),        # a machine was lost
    ([75, None], [TERM], ERROR),
])
def test_what_exit_codes_mean_together(codes, told, code):
    assert judge(codes, told) == code


def test_only_launches_without_progress_count():
    restarts = Restarts(limit=2, first_delay=1, longest_delay=3, requeues=False, furthest=10)
    found = [restarts.after(ERROR, step, False) for step in (15, 15, 12, 20, 20, 20, 20)]
    assert [verdict.relaunch for verdict in found] == [True] * 6 + [False]
    assert [verdict.delay for verdict in found[:6]] == [1, 2, 3, 1, 2, 3]
    assert found[-1].code == ERROR and "3 launches in a row came no further than step 20; --max-restarts is 2" in found[-1].reason


@pytest.mark.parametrize("code", [OK, USAGE, REQUEUE])
def test_what_is_never_started_again(code):
    verdict = Restarts(3, 1, 3, False, 0).after(code, 5, False)
    assert not verdict.relaunch and verdict.code == code


def test_requeued_here():
    restarts = Restarts(1, 1, 3, requeues=True, furthest=0)
    assert restarts.after(REQUEUE, 5, False).relaunch and restarts.after(REQUEUE, 5, False).relaunch
    assert not restarts.after(REQUEUE, 5, False).relaunch  # a run that is always interrupted before its first step
    assert not restarts.after(REQUEUE, 9, is_stopping=True).relaunch


def test_torchruns_variables():
    place = Place(launch=3, node=1, num_nodes=2, first_rank=4, num_local=2, world_size=6, address="node0", port=1234)
    found = place.environment(1)
    found.pop("OMP_NUM_THREADS", None)  # only where the user has not set it
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
                     "MASTER_ADDR": "node0", "MASTER_PORT": "1234", "TORCHELASTIC_RESTART_COUNT": "2"}


def test_where_the_run_is(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("run: {dir: runs/a, seed: 1}\nmodel: {family: llama}\n")
    assert run_dir([str(config)]) == Path("runs/a")
    assert run_dir([str(config), "run.dir=b", "train.steps=2", "run.dir=c"]) == Path("c")
    config.write_text("run: {dir: 'runs/${oc.env:NAME_OF_RUN}'}")
    monkeypatch.setenv("NAME_OF_RUN", "x")
    assert run_dir([str(config)]) == Path("runs/x")
    config.write_text("model: {family: llama}")
    for arguments, words in (([str(config)], "names no run.dir"), ([str(tmp_path / "none.yaml")], "cannot be read"), (["train.steps=2"], "no CONFIG.yaml")):
        with pytest.raises(UsageError, match=words):
            run_dir(arguments)


def test_how_far_a_run_is(tmp_path):
    assert steps_taken(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert steps_taken(tmp_path) == 7
    (tmp_path / "rung").mkdir()
    (tmp_path / "rung" / "metrics.jsonl").write_text('{"step": 3}\n')
    assert steps_taken(tmp_path) == 10


def test_the_supervisor_imports_no_heavy_package():
    code = "import sys; from engine.supervise import supervisor; print(*{'torch', 'numpy', 'pydantic', 'omegaconf'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""


# --- stubs of ranks --------------------------------------------------------------------------------------------------


class Supervised:
    """A supervisor underway. Its options come before the program, `arguments` of the stub behind it."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 2, options=(), program=STUB, config=None, console=None):
        self.folder, self.node = folder, int(dict(zip(options, options[1:])).get("--node-rank", 0))
        folder.mkdir(exist_ok=True)
        self.console = open(folder / f"console_{self.node}", "a")
        command = [sys.executable, ROOT / "launch/supervise.py", "--nproc-per-node", str(ranks), "--backoff-seconds", "0.1", "--grace-seconds", "0.2",
                   "--stop-seconds", "20", *options, program, config or folder / "run.yaml", f"run.dir={folder}", *arguments]
        self.process = subprocess.Popen(command, stdout=console or self.console, stderr=subprocess.STDOUT, cwd=ROOT,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})

    def events(self, name: str = "") -> list[dict]:
        path = self.folder / "logs" / (f"supervisor_{self.node:04d}.jsonl" if self.node else "supervisor.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [event for line in lines if line.endswith("\n") for event in [json.loads(line)] if name in ("", event["event"])]

    def until(self, is_so, seconds: float = 60):
        """What is_so() answers once that is true."""
        deadline = time.monotonic() + seconds
        while not (answer := is_so()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return answer

    def until_all_wait(self, num: int) -> None:
        """Until `num` stubs in all have come to where they wait."""
        self.until(lambda: sum(path.read_text().count("waits\n") for path in self.folder.glob("logs/rank_*.out")) == num)

    def said(self) -> str:
        return Path(self.console.name).read_text()

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; none of its ranks, nor what they started, is left."""
        code = self.process.wait(seconds)
        assert not left(self.folder), left(self.folder)
        return code


def left(folder: Path) -> list[psutil.Process]:
    """Processes that still work for the run in this folder. One that is only waiting to be reaped has ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and f"run.dir={folder}" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture
def supervised(tmp_path):
    """Starts supervisors; whatever a failed test leaves is ended."""
    started = []

    def start(*arguments, folder=tmp_path / "run", **options) -> Supervised:
        started.append(Supervised(folder, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.console.close()
        for process in left(one.folder):
            process.kill()


def codes(run: Supervised) -> list[tuple[int, int, int]]:
    return sorted((event["launch"], event["rank"], event["code"]) for event in run.events("exit"))


def test_a_run_without_faults(supervised):
    run = supervised("steps=3")
    assert run.wait() == OK and codes(run) == [(1, 0, 0), (1, 1, 0)]
    said = run.said()
    assert "[0:0] rank 0 of 2 goes on from 0\n" in said and "[0:1] rank 1 on stderr\n" in said and "supervisor: done\n" in said
    assert "rank 1 of 2" not in said  # stdout of the first alone, but all of it is kept
    assert "rank 1 of 2 goes on from 0\n" in (run.folder / "logs/rank_00001.out").read_text()
    again = supervised("steps=3", options=("--output", "all"))
    assert again.wait() == OK and "[0:1] rank 1 of 2 goes on from 3\n" not in again.said()  # saved only every 5 steps
    assert "[0:1] rank 1 of 2 goes on from 0\n" in again.said()


def test_a_killed_rank_ends_all_and_they_start_again(supervised):
    run = supervised("fault=1:0:7:kill", "fault=1:1:7:hang", "fault=2:0:12:3", "fault=2:1:11:hang")
    assert run.wait() == OK
    assert codes(run) == [(1, 0, -KILL), (1, 1, -signal.SIGUSR2), (2, 0, 3), (2, 1, -signal.SIGUSR2), (3, 0, 0), (3, 1, 0)]
    went_on = [line for line in (run.folder / "logs/rank_00000.out").read_text().splitlines() if "goes on" in line]
    assert went_on == [f"rank 0 of 2 goes on from {step}" for step in (0, 5, 10)]
    assert "rank 0 was ended by SIGKILL" in run.said() and "rank 0 left with exit code 3" in run.said()


def test_a_stopped_rank_is_ended_when_another_dies(supervised):
    run = supervised("fault=1:0:7:hang", "fault=1:1:7:stop")
    run.until_all_wait(1)
    run.until(lambda: any(process.status() == psutil.STATUS_STOPPED for process in left(run.folder)))
    os.kill(run.events("launch")[0]["pids"][0], KILL)
    assert run.wait() == OK and codes(run) == [(1, 0, -KILL), (1, 1, -KILL), (2, 0, 0), (2, 1, 0)]


def test_a_run_that_cannot_start_is_given_up(supervised):
    run = supervised(*(f"fault={launch}:0:1:1" for launch in range(1, 9)), options=("--max-restarts", "2"))
    assert run.wait() == ERROR
    assert [event["delay"] for event in run.events("verdict")] == [0.2, 0.4, 0]
    assert "3 launches in a row came no further than step 0" in run.said()


def test_a_wrong_configuration_is_not_started_again(supervised):
    run = supervised("fault=1:0:1:2")
    assert run.wait() == USAGE and len(run.events("launch")) == 1


@pytest.mark.parametrize("number", [TERM, USR1, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks(supervised, number):
    run = supervised("fault=1:0:7:wait", "fault=1:1:7:wait")
    run.until_all_wait(2)
    run.tell(number)
    assert run.wait() == REQUEUE and codes(run) == [(1, 0, REQUEUE), (1, 1, REQUEUE)]
    assert (run.folder / "saved").read_text() == "7"


def test_requeue_here_starts_again_after_usr1_but_not_after_term(supervised):
    run = supervised("fault=1:0:7:wait", "fault=1:1:7:wait", "fault=2:0:9:wait", "fault=2:1:9:wait", options=("--requeue-here",))
    for number, waiting in ((USR1, 2), (TERM, 4)):
        run.until_all_wait(waiting)
        run.tell(number)
    assert run.wait() == REQUEUE and [code for *_, code in codes(run)] == [REQUEUE] * 4
    assert (run.folder / "saved").read_text() == "9"


def test_a_signal_while_ranks_start(supervised):
    """One that has not yet asked for it dies of the signal; nothing was to be saved."""
    run = supervised("fault=1:0:1:unready", "fault=1:1:1:unready")
    run.until_all_wait(2)
    run.tell(TERM)
    assert run.wait() == REQUEUE and codes(run) == [(1, 0, -TERM), (1, 1, -TERM)]


def test_a_signal_while_it_waits_to_start_again(supervised):
    run = supervised("fault=1:0:1:1", options=("--backoff-seconds", "600", "--longest-backoff-seconds", "600"))
    run.until(lambda: run.events("verdict"))
    run.tell(TERM)
    assert run.wait() == REQUEUE and len(run.events("launch")) == 1


def test_ranks_that_do_not_listen_are_ended(supervised):
    run = supervised("fault=1:0:1:hang", "fault=1:1:1:hang", options=("--stop-seconds", "0.3"))
    run.until_all_wait(2)
    run.tell(TERM)
    assert run.wait() == ERROR and "failed while it was to stop" in run.said()


def test_a_second_interrupt_ends_at_once(supervised):
    run = supervised("fault=1:0:1:hang", "fault=1:1:1:hang")
    run.until_all_wait(2)
    run.tell(signal.SIGINT)
    run.until(lambda: run.events("signal"))
    run.tell(signal.SIGINT)
    assert run.wait() == ERROR and [code for *_, code in codes(run)] == [-KILL, -KILL]


def test_a_terminal_that_takes_nothing_holds_nobody_up(supervised):
    reading, writing = os.pipe()
    run = supervised("fault=1:0:7:shout", "fault=1:1:7:shout", console=writing)
    run.until_all_wait(2)
    run.tell(TERM)
    assert run.wait() == REQUEUE and os.read(reading, 12) == b"supervisor: "
    assert (run.folder / "logs/rank_00001.err").stat().st_size > 1_000_000
    os.close(reading)
    os.close(writing)


@LINUX
def test_what_a_rank_has_started_does_not_outlive_it(supervised):
    run = supervised("fault=1:0:2:child", "fault=1:0:3:wait", ranks=1)
    run.until_all_wait(1)
    rank, child = psutil.Process(run.process.pid).children(recursive=True)
    run.tell(TERM)
    assert run.wait() == REQUEUE and not child.is_running()


@LINUX
def test_a_killed_supervisor_leaves_no_rank(supervised):
    run = supervised("fault=1:0:7:wait", "fault=1:1:7:wait")
    run.until_all_wait(2)
    ranks = left(run.folder)
    run.tell(KILL)
    run.process.wait()
    _, alive = psutil.wait_procs([process for process in ranks if process.pid != run.process.pid], timeout=20)
    assert len(ranks) == 3 and not alive
    assert (run.folder / "saved").read_text() == "7"
    assert supervised().wait() == OK


@LINUX
def test_ranks_that_outlive_a_killed_supervisor_are_ended_by_the_next(supervised):
    run = supervised("fault=1:0:7:hang", "fault=1:1:7:stop")
    run.until_all_wait(1)
    run.until(lambda: any(process.status() == psutil.STATUS_STOPPED for process in left(run.folder)))
    run.tell(KILL)
    run.process.wait()
    again = supervised(options=("--stop-seconds", "0.3"))
    assert again.wait() == OK
    assert "waiting for ranks that an earlier supervisor left" in again.said() and "killed" in again.said()


def test_two_supervisors_do_not_share_a_run(supervised):
    run = supervised("fault=1:0:1:wait", "fault=1:1:1:wait")
    run.until_all_wait(2)
    other = supervised()
    assert other.process.wait(60) == USAGE
    assert f"a supervisor (process {run.process.pid} of" in other.said() and "end it first" in other.said()
    run.tell(TERM)
    assert run.wait() == REQUEUE


@pytest.mark.parametrize("options, words", [
    (["--nproc-per-node", "0"], "must be at least 1"),
    (["--nnodes", "2"], "--master (not given) is not HOST:PORT"),
    (["--nnodes", "2", "--node-rank", "2", "--master", "localhost:1"], "--node-rank 2 is none of the 2 nodes"),
    (["nowhere.py"], "no program at nowhere.py"),
])
def test_what_cannot_be_started(options, words):
    done = subprocess.run([sys.executable, "launch/supervise.py", *options, str(STUB), "run.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == USAGE and words in done.stderr and "Traceback" not in done.stderr


# --- several nodes, on loopback --------------------------------------------------------------------------------------


@pytest.fixture
def node(supervised):
    """Starts the supervisor of a node with one rank; all share a folder, as nodes do."""
    with socket.socket() as wire:
        wire.bind(("localhost", 0))
        port = wire.getsockname()[1]

    def start(number: int, *arguments: str, num_nodes=2, options=(), **others) -> Supervised:
        nodes = ("--nnodes", str(num_nodes), "--node-rank", str(number), "--master", f"localhost:{port}")
        return supervised(*arguments, ranks=1, options=(*nodes, *options), **others)

    return start


def ends(*runs: Supervised) -> list[int]:
    found = [run.process.wait(60) for run in runs]
    assert not left(runs[0].folder)
    return found


def test_nodes_start_again_together(node):
    faults = ("fault=1:0:7:kill", "fault=1:1:7:hang", "fault=2:1:8:1", "fault=2:0:8:hang")
    first, second = node(0, *faults), node(1, *faults)
    assert ends(first, second) == [OK, OK]
    assert codes(first) == [(1, 0, -KILL), (2, 0, -signal.SIGUSR2), (3, 0, 0)] and codes(second) == [(1, 1, -signal.SIGUSR2), (2, 1, 1), (3, 1, 0)]
    assert "rank 1 of 2 goes on from 5" in (second.folder / "logs/rank_00001.out").read_text()
    assert {event["port"] for event in first.events("launch")} == {event["port"] for event in second.events("launch")}


def test_nodes_are_given_up_together(node):
    faults = [f"fault={launch}:{rank}:1:{kind}" for launch in range(1, 9) for rank, kind in ((0, "hang"), (1, "1"))]
    options = ("--max-restarts", "1")
    assert ends(node(0, *faults, options=options), node(1, *faults, options=options)) == [ERROR, ERROR]


def test_a_signal_to_one_node_stops_all(node):
    faults = ("fault=1:0:7:wait", "fault=1:1:7:wait")
    first, second = node(0, *faults), node(1, *faults)
    first.until_all_wait(2)
    second.tell(TERM)
    assert ends(first, second) == [REQUEUE, REQUEUE] and (first.folder / "saved").read_text() == "7"


@LINUX
@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_whose_supervisor_was_killed_comes_back(node, killed):
    faults = ("fault=1:0:7:wait", "fault=1:1:7:wait")
    runs = [node(0, *faults), node(1, *faults)]
    runs[0].until_all_wait(2)
    runs[killed].tell(KILL)
    runs[killed].process.wait()
    other = runs[1 - killed]
    other.until(lambda: other.events("verdict"))
    assert (other.folder / "saved").read_text() == "7"  # its ranks saved with those of the other
    runs[killed] = node(killed)
    assert ends(*runs) == [OK, OK]


def test_nodes_that_do_not_fit_together(node):
    first, other = node(0), node(1, num_nodes=3)
    assert other.process.wait(60) == ERROR and "was started with --nnodes 3, node 0 with --nnodes 2" in other.said()
    first.tell(TERM)
    assert ends(first) == [REQUEUE]
    alone = node(0, options=("--join-seconds", "0.5"))
    assert ends(alone) == [ERROR] and "node 1 did not come to localhost:" in alone.said()


def test_a_second_supervisor_of_a_node_takes_its_place(node, tmp_path):
    first, second = node(0), node(1, "fault=1:1:7:wait")
    second.until_all_wait(1)
    third = node(1, folder=tmp_path / "elsewhere")  # as on another machine, where the lock of the first is not seen
    assert second.process.wait(60) == ERROR and "another supervisor has come as node 1; give each its own --node-rank" in second.said()
    assert [first.process.wait(60), third.process.wait(60)] == [OK, OK]


def test_a_node_that_waits_can_be_stopped(node):
    first = node(0)
    first.until(lambda: first.events("join"))
    first.tell(TERM)
    assert ends(first) == [REQUEUE]


# --- real ranks ------------------------------------------------------------------------------------------------------

SAME = ("step", "split", "loss", "grad_norm", "lr", "consumed_samples", "tokens", "skipped")  # the rest of a line is time and memory


def lines(folder) -> list[dict]:
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in SAME} for line in found]


@LINUX
def test_a_run_that_meets_three_faults_is_bit_equal_to_an_unbroken_one(raw_run, supervised, tmp_path):
    """A rank killed in mid-step, SIGTERM to the supervisor, the supervisor killed: nothing but starting it again is done in between."""
    from engine.mcore.checkpoint import read_tensors

    holds, folder = tmp_path / "holds", tmp_path / "broken"
    holds.mkdir()
    raw = merged(raw_run, {"stage": "tests.gated:Gated", "stage_options": {"holds": str(holds)}, "train": {"steps": 14, "eval_every": 7},
                           "checkpoint": {"save_every": 4}, "run": {"dir": str(tmp_path / "unbroken")}, "parallel": {"zero1": True}})
    on_ranks(2, raw)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    for step in (7, 9, 12):
        (holds / f"hold_{step}_1").touch()  # rank 0 goes on into the step and waits there for rank 1

    def start(at: int) -> Supervised:
        run = supervised(folder=folder, program="launch/pretrain.py", config=tmp_path / "run.yaml", options=("--grace-seconds", "10", "--stop-seconds", "100"))
        run.until((holds / f"at_{at}_1").exists, 200)
        return run

    def status() -> dict:
        return json.loads((folder / "status.json").read_text())

    run = start(7)
    os.kill(run.events("launch")[0]["pids"][1], KILL)
    killed = time.time()
    (holds / "hold_7_1").unlink()
    first, second = run.until(lambda: len(run.events("exit")) == 2 and run.events("exit"), 100)
    assert (first["rank"], first["code"]) == (1, -KILL) and (second["rank"], second["code"]) == (0, ERROR)
    print(f"found {datetime.datetime.fromisoformat(first['time']).timestamp() - killed:.3f} s after the kill")
    assert "another rank has ended, so this one cannot go on" in run.said()

    run.until((holds / "at_9_1").exists, 200)
    run.tell(TERM)
    run.until(lambda: run.events("signal"))
    (holds / "hold_9_1").unlink()
    assert run.wait(100) == REQUEUE
    assert (status()["state"], status()["step"]) == ("requeue", 9)

    run = start(12)
    run.tell(KILL)
    run.process.wait()
    (holds / "hold_12_1").unlink()
    _, alive = psutil.wait_procs(left(folder), timeout=100)
    assert not alive and (status()["state"], status()["step"]) == ("requeue", 12)

    assert supervised(folder=folder, program="launch/pretrain.py", config=tmp_path / "run.yaml").wait(200) == OK
    assert status()["state"] == "done"
    assert lines(folder) == lines(tmp_path / "unbroken") and len(lines(folder)) == 16
    broken, unbroken = (read_tensors(path) for path in (folder, tmp_path / "unbroken"))
    assert broken.keys() == unbroken.keys() and all(np.array_equal(broken[name], unbroken[name]) for name in broken)
