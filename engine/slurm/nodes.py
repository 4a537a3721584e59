"""What is wrong with this node, as far as one process can see: GPUs, memory, /dev/shm and the disk of the run.

    found = problems(run)                 # sentences; empty: nothing

Left out: what only several nodes together show (collective.py), and temperatures, error counters and the like, which a cluster's own health
check knows better.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

GB = 10**9


def problems(run) -> list[str]:
    """What is wrong with this node for a job of run.slurm."""
    check, expected = run.slurm.check, run.slurm.gpus_per_node
    return [
        *(gpu_problems(expected, check.min_gpu_free) if expected else []),
        *_at_least("memory", _available_memory(), check.min_memory_gb, "slurm.check.min_memory_gb"),
        *_room("/dev/shm", check.min_shm_gb, "slurm.check.min_shm_gb"),
        *disk_problems(Path(run.run.dir), check.min_disk_gb),
    ]


def gpu_problems(expected: int, min_free: float, command: str = "nvidia-smi") -> list[str]:
    """Missing GPUs, and GPUs whose memory somebody holds. command: nvidia-smi, or what answers like it."""
    query = [command, "--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [f"{command} is not installed, so none of the {expected} GPUs can be seen"]
    except subprocess.TimeoutExpired:
        return [f"{command} has not answered in 60 s"]
    if done.returncode:
        return [f"{command} ended with code {done.returncode}: {(done.stderr or done.stdout).strip()}"]
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    found = [] if len(rows) == expected else [f"{len(rows)} GPUs, not {expected}"]
    for index, total, free in rows:
        if not (total.isdigit() and free.isdigit()):
            found.append(f"GPU {index} does not tell its memory ({total}, {free})")
        elif int(free) < min_free * int(total):
            found.append(f"GPU {index} has {free} of {total} MiB free, less than {min_free:.0%} (slurm.check.min_gpu_free); another process holds it")
    return found


def disk_problems(folder: Path, min_gb: float) -> list[str]:
    """Whether a file can be written into `folder` and read again, and the room beside it."""
    content = os.urandom(4096)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if Path(file.name).read_bytes() != content:
                return [f"{folder} gives back other bytes than were written"]
    except OSError as error:
        return [f"{folder} cannot be written: {error}"]
    return _room(str(folder), min_gb, "slurm.check.min_disk_gb")


def _room(folder: str, min_gb: float, key: str) -> list[str]:
    if not min_gb:
        return []
    try:
        return _at_least(folder, shutil.disk_usage(folder).free, min_gb, key)
    except OSError as error:
        return [f"{folder}: {error}"]


def _at_least(what: str, num_bytes: float, min_gb: float, key: str) -> list[str]:
    return [f"{what} has {num_bytes / GB:.2f} GB free, less than {min_gb:g} ({key})"] if num_bytes < min_gb * GB else []


def _available_memory() -> float:
    import psutil

    return psutil.virtual_memory().available
