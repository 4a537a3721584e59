"""What the GPU tests share: which GPUs there are, asked of the driver without torch, and a training run in a process of its own."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from training import merged

ROOT = Path(__file__).parents[2]


def driver():
    """The CUDA driver, started, or None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if cuda.cuInit(0) else cuda


def num_gpus() -> int:
    """GPUs that this process may use; 0 without a driver."""
    cuda, count = driver(), ctypes.c_int()
    return count.value if cuda and not cuda.cuDeviceGetCount(ctypes.byref(count)) else 0


def capability() -> tuple[int, int]:
    """Compute capability of the first GPU, such as (9, 0) for Hopper."""
    values = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        assert not driver().cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        values.append(value.value)
    return tuple(values)


def has_te() -> bool:
    """Whether Transformer Engine can be imported, in a process of its own."""
    code = "import sys, engine.mcore; sys.exit(bool(engine.mcore.te_problem))"
    return not subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode


def loss_errors(device: str = "cuda") -> dict[str, list[float]]:
    """What loss_probe.py found, in a process of its own: case -> relative errors of nll and of both gradients."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "gpu" / "loss_probe.py"), device], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(raw: dict, *changes: dict, num_ranks: int = 1, device: str = "cuda") -> list[dict]:
    """Run launch/pretrain.py, or align.py, on `num_ranks` GPUs (or one CPU rank). The training lines of metrics.jsonl so far."""
    from engine.config import dump_config, validate
    from engine.log import read_metrics
    from engine.stages import ALIGN

    run = validate(merged(raw, *changes, {"run": {"device": device}}), num_ranks)
    folder = Path(run.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "asked.yaml"
    config.write_text(dump_config(run))
    command = "launch/align.py" if run.stage in ALIGN else "launch/pretrain.py"
    launch = [sys.executable, command] if num_ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", command]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    done = subprocess.run([*launch, str(config)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, (done.stdout + done.stderr)[-6000:]
    return read_metrics(run.run.dir)
