"""benchmarks/gpu_table.py: the code of its rows runs, at toy sizes on a CPU, and what it prints is what was measured. Speed is not looked at."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_table  # noqa: E402


def test_rows_run_on_a_cpu(tmp_path):
    table = tmp_path / "table.md"
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--tiny", "--only", "gpt_1.7b,loss", "--output", str(table)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in cells] == [["gpt_1.7b", "ours"], ["gpt_1.7b", "megatron-core"], ["loss", "ours"], ["loss", "F.linear, F.cross_entropy"],
                                         ["loss", "F.linear_cross_entropy, chunked"]]
    assert all(float(row[2]) > 0 for row in cells), done.stderr
    assert [float(row[5]) > 0 for row in cells if row[5]] == [True, True, True]


MISSING = [name for name in ("torchtitan", "triton") if find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed (benchmarks/peers.txt)")
@pytest.mark.parametrize("more", [{"tied": True, "groups": 2}, {}], ids=["tied, grouped", "plain"])
def test_torchtitan_does_the_engines_work(more):
    """With equal weights and tokens the same loss and gradient norm, but for fp32 rounding, from as many parameters: the same FLOPs."""
    sizes = {**gpu_table.TINY, "device": "cpu", "micro_batches": 2, **more}
    done = subprocess.run([sys.executable, "tests/titan_probe.py", json.dumps(sizes)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6) and found["loss"][0] > 5
    assert found["gradient norm"][0] == pytest.approx(found["gradient norm"][1], rel=2e-6)
    assert found["parameters"][0] == found["parameters"][1]


def test_a_row_whose_peer_is_not_installed_says_so(tmp_path):
    (tmp_path / "torchtitan.py").write_text("raise ModuleNotFoundError(\"No module named 'torchtitan'\")")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--tiny", "--only", "llama_1b_2048"], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| llama_1b_2048")]
    told = "No module named 'torchtitan'; benchmarks/peers.txt names what to install"
    assert rows[1:] == [f"| llama_1b_2048 | {label} | {told} | | | |  | |" for label in ("torchtitan", "torchtitan, SDPA")]


def test_the_peers_agree_with_what_the_tree_was_tried_with():
    def pins(file: str) -> dict:
        return dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line and not line.startswith("#"))

    peers, tried = pins("benchmarks/peers.txt"), pins("constraints.txt")
    assert peers["torchtitan"] == "0.3.0" and not {"torch", "triton"} & peers.keys()
    assert {name: version for name, version in peers.items() if tried.get(name, version) != version} == {}


def test_the_one_command_says_what_it_does_and_does_nothing_by_mistake(tmp_path):
    def said(*arguments):
        return subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True)

    asked = said("--help")
    assert asked.returncode == 0 and "doctor, tests, table, planner (all)" in asked.stdout and asked.stdout.splitlines()[-1].startswith("Left out: installing")
    assert said("--dry-run").returncode == 2 and said(str(tmp_path / "results"), "speed").returncode == 2
    assert said("tests", "table").returncode == 2 and "the folder comes first: benchmarks/gpu.sh FOLDER tests table" in said("tests", "table").stderr
    assert not list(tmp_path.iterdir()) and not (ROOT / "--help").exists()


def test_a_row_is_told_by_medians_and_a_missing_library_by_name():
    row = gpu_table.Row("work", {}, {"ours": ("ours", {}), "theirs": ("megatron", {}), "other": ("torchtitan", {})}, gpu_table.Goal({"theirs": 2}))
    found = {"ours": {"seconds": [0.1, 0.2, 0.9], "flops": 4e12, "peak_gib": 3.0, "above_gib": 1.0},
             "theirs": {"seconds": [0.5, 0.4, 0.3], "flops": 4e12, "peak_gib": 5.0, "above_gib": 2.0}, "other": {"missing": "No module named 'other'"}}
    assert gpu_table.lines_of(row, found) == ["| work | ours | 200.00 | 20.0 | 3.00 |  | at least 2.00x theirs | **met** |",
                                              "| work | theirs | 400.00 | 10.0 | 5.00 | 2.00 |  |  |", "| work | other | No module named 'other' | | | |  | |"]


@pytest.mark.parametrize("goal, verdict", [
    (dict(), ""),
    (dict(tflops=20), "**met**"),
    (dict(tflops=20.1), "**missed**: 20.0 TFLOP/s"),
    (dict(speed={"theirs": 2.0}), "**met**"),
    (dict(speed={"theirs": 2.1}, tflops=30), "**missed**: 20.0 TFLOP/s, 2.00x theirs"),
    (dict(memory={"theirs": 0.6}), "**met**"),
    (dict(memory={"theirs": 0.5}), "**missed**: 0.60x the memory of theirs"),
    (dict(speed={"theirs": 2.0, "other": 1.0}), "open: no figure of other"),
    (dict(speed={"theirs": 3.0, "other": 1.0}), "**missed**: 2.00x theirs"),
])
def test_a_goal_is_told_to_be_met_or_not(goal, verdict):
    assert gpu_table.Goal(**goal).verdict({"ours": 0.2, "theirs": 0.4}, 4e12, {"ours": 3.0, "theirs": 5.0}) == verdict


def test_an_unknown_row_is_refused():
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--only", "gpt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no row is called gpt; there are gemm, gpt_1.7b" in done.stderr


def test_a_contestant_that_fails_is_told_and_counted(monkeypatch, capsys):
    row = gpu_table.Row("work", {}, {"ours": ("ours", {}), "theirs": ("megatron", {})}, gpu_table.Goal())
    monkeypatch.setattr(gpu_table, "ROWS", [row])
    monkeypatch.setattr(gpu_table, "machine", lambda device: "a machine")
    monkeypatch.setattr(gpu_table, "measured", lambda row, arguments: {"ours": {"failed": "OutOfMemoryError"}, "theirs": {"missing": "no library"}})
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", "--only", "work"])
    assert gpu_table.main() == 1
    said = capsys.readouterr()
    assert said.err == "not there: work: theirs\nfailed: work: ours\n" and "| work | ours | OutOfMemoryError |" in said.out and "| work | theirs | no library |" in said.out


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu_table, "machine", lambda device: "")
    monkeypatch.setattr(sys, "argv", ["gpu_table.py"])
    assert gpu_table.main() == 1 and "sees no GPU" in capsys.readouterr().err
