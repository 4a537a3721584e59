"""The shape of the tree: one folder touches megatron, imports point one way, and what needs no torch answers without it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "data_tools", "launch", "examples", "csrc")
ENGINES = {"megatron", "transformer_engine", "apex"}

# Who may import whom inside the project; a name stands for everything below it. The open ones are for all of engine.
OPEN = {"engine.config", "engine.section", "engine.model_sections", "engine.safety_sections", "engine.stage_sections", "engine.online_sections",
        "engine.sampling", "engine.foreign", "engine.run_folder", "engine.adapters", "engine.rope", "engine.torch_only", "engine.loss_memory", "engine.hashes",
        "engine.mapped", "engine.rows", "engine.profiling", "engine.environment", "engine.stage", "engine.log", "engine.signals"}
MAY_IMPORT = {
    "engine.config": {"engine.checks", "engine.models", "engine.launch_sections"},
    "engine.checks": {"engine.stages", "engine.schedule"},
    "engine.models": {"engine.models"},
    "engine.section": set(),
    "engine.launch_sections": set(),
    "engine.model_sections": set(),
    "engine.safety_sections": set(),
    "engine.stage_sections": set(),
    "engine.online_sections": set(),
    "engine.sampling": set(),
    "engine.foreign": set(),
    "engine.run_folder": set(),
    "engine.adapters": set(),
    "engine.rope": set(),
    "engine.loss_memory": set(),
    "engine.torch_only": set(),
    "engine.environment": set(),
    "engine.hashes": set(),
    "engine.mapped": set(),
    "engine.rows": set(),
    "engine.stage": set(),
    "engine.schedule": set(),
    "engine.metrics": set(),
    "engine.log": {"engine.slurm"},
    "engine.slurm": {"engine.slurm", "engine.checks", "engine.stages"},
    "engine.status": set(),
    "engine.signals": set(),
    "engine.faults": set(),
    "engine.watch": set(),
    "engine.rollback": set(),
    "engine.profiling": {"engine.schedule"},
    "engine.losses": set(),
    "engine.rl": set(),
    "engine.rewards": {"engine.rewards", "engine.data", "data_tools"},
    "engine.data": {"engine.data", "engine._csrc", "engine.schedule", "data_tools"},
    "engine.stages": {"engine.stages", "engine.data", "engine.losses", "engine.rl", "engine.rewards", "engine.schedule"},
    "engine.hf": {"engine.hf", "engine.data.chat"},
    "engine.mcore": {"engine.mcore"},
    "engine.batches": {"engine.data", "engine.mcore", "engine.schedule"},
    "engine.step_record": {"engine.mcore", "engine.metrics"},
    "engine.train": {"engine.batches", "engine.step_record", "engine.checks", "engine.stages", "engine.data", "engine.mcore", "engine.hf", "engine.schedule",
                     "engine.faults", "engine.watch", "engine.rollback"},
    "engine.score": {"engine.train", "engine.data", "engine.mcore", "engine.losses", "data_tools"},
    "engine.write": {"engine.train", "engine.score", "engine.data", "engine.hf", "engine.mcore", "data_tools"},
    "engine.conversions": {"engine.hf", "engine.mcore", "data_tools"},
    "engine.doctor": {"engine.doctor", "engine.data", "engine._csrc"},
    "engine.recipe": {"engine.recipe", "engine.stages", "engine.schedule", "engine.metrics"},
    "engine.planner": {"engine.planner", "engine.checks", "engine.stages", "engine.schedule", "engine.metrics"},
    "engine.supervise": {"engine.supervise"},
    "engine.cli": {"engine.slurm", "engine.train", "engine.mcore", "engine.stages"},
    "data_tools": {"data_tools", "engine.data", "engine.config", "engine.foreign", "engine.log", "engine.rollback", "engine.run_folder", "engine.schedule",
                   "engine.stages"},
    "launch": {"engine", "data_tools"},
    "examples": {"engine", "data_tools"},
    "csrc": set(),
}


def python_files() -> list[Path]:
    files = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 30, "the scan looks in the wrong place"
    return files


def imports(path: Path) -> set[str]:
    """Dotted names a file imports anywhere in it, a function's body included: `from a.b import c` is a.b.c."""
    names = set()
    package = path.with_suffix("").parts
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:-node.level]) if node.level else ""
            names |= {".".join(filter(None, (base, node.module, alias.name))) for alias in node.names}
    return names


def is_below(name: str, roots) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def unit(path: Path) -> str:
    """The key of MAY_IMPORT that a file belongs to: engine/data/text.py is engine.data, launch/pretrain.py is launch."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_imports_point_one_way(path):
    outside = path.parts[:2] != ("engine", "mcore")
    assert not (outside and {name for name in imports(path) if is_below(name, ENGINES)}), "only engine/mcore/ imports these"
    own = {name for name in imports(path) if name.split(".")[0] in ("engine", "data_tools", "launch", "tests")}
    if path == Path("engine/__init__.py"):
        allowed = set()
    else:
        assert unit(path) in MAY_IMPORT, f"say in MAY_IMPORT what {unit(path)} may import"
        allowed = MAY_IMPORT[unit(path)] | (OPEN if path.parts[0] == "engine" else set())
    wrong = {name for name in own if not is_below(name, allowed)}
    assert not wrong, f"{unit(path)} may import {sorted(allowed)}, not {sorted(wrong)}"


def test_nothing_imports_dynamically_around_the_scan():
    """Outside the seam six files import by a computed name: the table of stages, two kinds of workers, which are told their job, a reward
    that is the user's own function, what the doctor tries in processes of their own, and optional libraries of the data tools."""
    outside = [path for path in python_files() if "mcore" not in path.parts]
    found = [str(path) for path in outside if any(word in (ROOT / path).read_text() for word in ("import_module", "__import__"))]
    assert found == ["engine/data/sandbox.py", "engine/doctor/inside.py", "engine/rewards/rules.py", "engine/rewards/worker.py", "engine/stages/__init__.py", "data_tools/files.py"]


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """What a fresh interpreter did."""
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


@pytest.fixture
def no_torch(tmp_path) -> dict[str, str]:
    """Environment variables of an interpreter where importing torch or megatron fails."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['megatron'] = None\n")
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_the_fixture_refuses_torch(no_torch):
    done = python("-c", "import torch", **no_torch)
    assert done.returncode == 1 and "import of torch halted" in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_help_needs_no_torch(no_torch, script):
    done = python(f"launch/{script}", "--help", **no_torch)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_a_cpu_rank_starts_without_the_compiler():
    """megatron decorates functions with torch.compile at import, which costs seconds of every start."""
    done = python("-c", "import sys, engine.train; print([name for name in ('torch._dynamo', 'torch._inductor.compile_fx') if name in sys.modules])",
                  CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_configuration_errors_need_no_torch(no_torch, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: x}\nmodel: {family: lama}\ntrain: {seq_len: 8, global_batch: 2, steps: 1}\n")
    done = python("launch/pretrain.py", str(path), "parallel.tp=3", "train.stepz=4", **no_torch)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{path}: " in done.stderr and "did you mean llama?" in done.stderr and "train.stepz is no key" in done.stderr
