"""benchmarks/gpu_table.py: the code of its rows runs, at toy sizes on a CPU, and what it prints is what was measured. Speed is not looked at."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_table  # noqa: E402


def test_rows_run_on_a_cpu(tmp_path):
    table = tmp_path / "table.md"
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--tiny", "--only", "gpt_1.7b,loss", "--output", str(table)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in cells] == [["gpt_1.7b", "ours"], ["gpt_1.7b", "megatron-core"], ["loss", "ours"], ["loss", "F.linear, F.cross_entropy"]]
    assert all(float(row[2]) > 0 for row in cells), done.stderr
    assert [float(row[5]) > 0 for row in cells if row[5]] == [True, True]


def test_the_one_command_says_what_it_does_and_does_nothing_by_mistake(tmp_path):
    def said(*arguments):
        return subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True)

    asked = said("--help")
    assert asked.returncode == 0 and "doctor, tests, table, planner (all)" in asked.stdout and asked.stdout.splitlines()[-1].startswith("planner.txt")
    assert said("--dry-run").returncode == 2 and said(str(tmp_path / "results"), "speed").returncode == 2
    assert not list(tmp_path.iterdir()) and not (ROOT / "--help").exists()


def test_a_row_is_told_by_medians_and_a_missing_library_by_name():
    row = gpu_table.Row("work", {}, {"ours": ("ours", {}), "theirs": ("megatron", {}), "other": ("torch_llama", {})}, "at least 2x")
    found = {"ours": {"seconds": [0.1, 0.2, 0.9], "flops": 4e12, "peak_gib": 3.0, "above_gib": 1.0},
             "theirs": {"seconds": [0.5, 0.4, 0.3], "flops": 4e12, "peak_gib": 5.0, "above_gib": 2.0}, "other": {"missing": "No module named 'other'"}}
    assert gpu_table.lines_of(row, found) == ["| work | ours | 200.00 | 20.0 | 3.00 |  | at least 2x |", "| work | theirs | 400.00 | 10.0 | 5.00 | 2.00 |  |",
                                              "| work | other | No module named 'other' | | | | |"]


def test_an_unknown_row_is_refused():
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--only", "gpt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no row is called gpt; there are gemm, gpt_1.7b" in done.stderr


def test_a_contestant_that_fails_is_told_and_counted(monkeypatch, capsys):
    row = gpu_table.Row("work", {}, {"ours": ("ours", {}), "theirs": ("megatron", {})}, "at least 2x")
    monkeypatch.setattr(gpu_table, "ROWS", [row])
    monkeypatch.setattr(gpu_table, "machine", lambda device: "a machine")
    monkeypatch.setattr(gpu_table, "measured", lambda row, arguments: {"ours": {"failed": "OutOfMemoryError"}, "theirs": {"missing": "no library"}})
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", "--only", "work"])
    assert gpu_table.main() == 1
    said = capsys.readouterr()
    assert said.err == "failed: work: ours\n" and "| work | ours | OutOfMemoryError |" in said.out and "| work | theirs | no library |" in said.out


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu_table, "machine", lambda device: "")
    monkeypatch.setattr(sys, "argv", ["gpu_table.py"])
    assert gpu_table.main() == 1 and "sees no GPU" in capsys.readouterr().err
