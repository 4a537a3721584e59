"""The lines of the doctor's screen: each function looks at one part and says what it found, what is used instead, and what would cure it.

state: ok; instead (something else does its work, or a run may have to do without); broken (training cannot run). Standard library only.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
ORDER = ("Python", "packages", "torch", "megatron-core", "C++ core", "Transformer Engine", "apex", "DALI", "extras", "gloo", "NCCL", "disk", "/dev/shm")
PIP = "pip install -c constraints.txt"
REINSTALL = f"{PIP} --no-build-isolation -e '.[dev]'    # or: make setup"
ON_A_GPU = "of use on a GPU only"
TIMEOUT = 120  # seconds: a cold file system may take one to read torch
SELF_TEST = 5  # seconds
LITTLE_DISK, LITTLE_SHM = 10 << 30, 1 << 30  # bytes


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "instead", "broken"]
    found: str
    """What is there: a version, a measurement, or why not."""
    instead: str = ""
    """What is used in its place, or what that means for a run."""
    cure: str = ""
    """A command that gets it."""


@dataclass(frozen=True)
class Build:
    """What others need to know of torch."""

    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    is_there: bool = False


def probe(*arguments: str, env: dict | None = None) -> dict:
    """What inside.py answers in a process of its own; an `error` where that ended or hung."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "engine.doctor.inside", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": path, **(env or {})})
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {TIMEOUT} s; if this machine is busy, ask again when it is not"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"the process ended with code {done.returncode}: {last}"}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Finding("Python", "ok", found)
    return Finding("Python", "broken", found, "3.11 or 3.12 is needed: megatron-core 0.16.1 has wheels for no other", "make setup PYTHON=python3.11")


def packages() -> Finding:
    """The plain dependencies, from the project's own metadata."""
    wanted = _requirements(extra=None)
    if not wanted:
        return Finding("packages", "broken", "this project is not installed in this Python", "", "make setup    # then: source .venv/bin/activate")
    missing = [name for name in wanted if version(name) is None]
    if missing:
        return Finding("packages", "broken", f"missing: {', '.join(missing)}", "", REINSTALL)
    return Finding("packages", "ok", f"all {len(wanted)} are there")


def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that the project (or one of its extras) asks for."""
    try:
        asked = importlib.metadata.requires("trireme-lm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    split = ((re.match(r"[\w.-]+", line)[0], re.search(r"""extra == ["']([\w-]+)["']""", line)) for line in asked)
    return [name for name, mark in split if (mark[1] if mark else None) == extra]


def torch_build() -> tuple[Build, Finding]:
    found = probe("torch")
    if "error" in found:
        return Build(), Finding("torch", "broken", found["error"], "", f"{PIP} torch    # before everything else; or: make setup")
    gpus = tuple(gpu["name"] for gpu in found["gpus"])
    build = Build(found["cuda"], gpus, True)
    what = f"{found['version']}, " + (f"CUDA {found['cuda']}, cuDNN {found['cudnn']}, NCCL {found['nccl']}" if found["cuda"] else "a build without CUDA")
    if gpus:
        kinds = Counter(f"{gpu['name']} ({gpu['gib']:.0f} GiB, capability {gpu['capability']})" for gpu in found["gpus"])
        return build, Finding("torch", "ok", f"{what}; " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if shutil.which("nvidia-smi"):
        cause = "the driver is there (nvidia-smi), but torch sees no GPU: " + (
            "CUDA_VISIBLE_DEVICES hides it" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else
            "its build has no CUDA" if not found["cuda"] else "the driver may be older than this build's CUDA, see nvidia-smi's first line")
        cure = "" if found["cuda"] else f"{PIP} --force-reinstall torch"
        return build, Finding("torch", "instead", f"{what}; no GPU", f"{cause}; runs take the CPU", cure)
    return build, Finding("torch", "ok", f"{what}; no GPU, so runs take CPU ranks over gloo")


def megatron() -> Finding:
    there, pinned = version("megatron-core"), next((line.split("==")[1] for line in _pins() if line.startswith("megatron-core==")), None)
    if there is None:
        return Finding("megatron-core", "broken", "not installed", "", REINSTALL)
    if pinned and there != pinned:
        return Finding("megatron-core", "broken", f"{there}; the engine is written against {pinned}", "", f"{PIP} megatron-core=={pinned}")
    found = probe("package", "engine.mcore")  # with the engine's own preparations, as a run imports it
    if "error" in found:
        return Finding("megatron-core", "broken", f"{there} cannot be imported: {found['error']}", "", REINSTALL)
    return Finding("megatron-core", "ok", there)


def _pins() -> list[str]:
    file = ROOT / "constraints.txt"
    return file.read_text().split() if file.is_file() else []


def core() -> Finding:
    found = probe("core", str(SELF_TEST))
    if "error" in found:
        is_absent = "_csrc" in found["error"]
        return Finding("C++ core", "broken", "not built" if is_absent else found["error"], "",
                       f"{PIP} --no-build-isolation -e .    # needs a C++17 compiler, such as Debian's g++; or: make setup")
    return Finding("C++ core", "ok", f"{found['tokens']:,} tokens written, indexed, gathered and compared in {SELF_TEST} s")


def transformer_engine(build: Build) -> Finding:
    name, is_cuda_12 = "Transformer Engine", (build.cuda or "").startswith("12.")
    cure = (f"{PIP} --no-build-isolation " + ("'transformer-engine[core_cu12,pytorch]'" if is_cuda_12 else "-e '.[gpu]'")
            + f"    # {'' if build.gpus else ON_A_GPU + '; '}needs nvcc, cuDNN and NCCL headers: docs/gpu.md")
    instead = "train.backend=auto takes the torch layers (no FP8, no fused norms); train.backend=te is refused"
    known = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")
    parts = ", ".join(f"{part} {version(part)}" for part in known if version(part))
    if importlib.util.find_spec("transformer_engine") is None and not parts:
        return Finding(name, "instead", "not installed" + ("" if build.gpus else ", and of no use without a GPU"), instead, cure)
    found = probe("package", "transformer_engine.pytorch")
    if "error" in found:
        return Finding(name, "instead", f"half installed ({parts or 'files without metadata'}): {found['error']}", instead, cure)
    if not build.gpus:
        return Finding(name, "instead", f"{parts}; no GPU to use it on", instead)
    return Finding(name, "ok", parts)


def apex(build: Build) -> Finding:
    instead = "not needed: AdamW is Transformer Engine's or torch's fused one, and gradients are added in TE's products"
    if importlib.util.find_spec("apex") is None:
        return Finding("apex", "ok", f"not installed; {instead}")
    found = probe("apex")
    if "error" in found:
        return Finding("apex", "instead", f"cannot be imported: {found['error']}", instead, "pip uninstall apex")
    if not found["is_nvidias"]:
        return Finding("apex", "instead", f"the package of that name on the index is another project (a web toolkit), not NVIDIA's: {found['file']}", instead,
                       "pip uninstall apex")
    return Finding("apex", "ok", f"NVIDIA's; {instead}")


def dali(build: Build) -> Finding:
    there = next((f"{name} {version(name)}" for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110") if version(name)), None)
    instead = "data.feed=auto copies batches from pinned buffers on a stream of its own" if build.gpus else "a CPU run copies nothing"
    only = "" if build.gpus else f"    # {ON_A_GPU}"
    if there is None:
        return Finding("DALI", "instead", "not installed", instead, f"{PIP} nvidia-dali-cuda130{only}")
    found = probe("package", "nvidia.dali")
    if "error" in found:
        return Finding("DALI", "instead", f"{there} cannot be imported: {found['error']}", instead,
                       f"{PIP} --force-reinstall nvidia-dali-cuda130{only}")
    return Finding("DALI", "ok", there)


def extras() -> Finding:
    """Optional packages, by the extra that brings them."""
    extras = {"data": "preprocess, filter and object stores", "rl": "judging answers", "eval": "lm-eval on an export"}
    missing = {extra: [name for name in _requirements(extra) if version(name) is None] for extra in extras}
    if not any(_requirements(extra) for extra in extras):
        return Finding("extras", "instead", "not known, for this project is not installed in this Python", "",
                       "make setup    # then: source .venv/bin/activate")
    lacking = {extra: names for extra, names in missing.items() if names}
    if not lacking:
        return Finding("extras", "ok", f"{', '.join(extras)}: complete")
    return Finding("extras", "instead", "; ".join(f"[{extra}] ({extras[extra]}) lacks {', '.join(names)}" for extra, names in lacking.items()),
                   "the commands that want one say so", f"{PIP} -e '.[{','.join(lacking)}]' --no-build-isolation")


def gloo(build: Build) -> Finding:
    if not build.is_there:
        return Finding("gloo", "broken", "torch cannot be imported")
    found = _collective("gloo", 2, "cpu")
    if "error" in found:
        return Finding("gloo", "broken", f"two processes could not add: {found['error']}",
                       "gloo binds to the interface of this machine's name; GLOO_SOCKET_IFNAME names another, such as lo",
                       "GLOO_SOCKET_IFNAME=lo python launch/doctor.py")
    return Finding("gloo", "ok", f"two processes on this machine, {found['gb_per_s']:.2f} GB/s")


def nccl(build: Build) -> Finding:
    if not build.gpus:
        return Finding("NCCL", "instead", "no GPU", "ranks on a CPU speak gloo")
    found = _collective("nccl", len(build.gpus), "cuda")
    if "error" in found:
        return Finding("NCCL", "broken", f"{len(build.gpus)} GPUs could not add: {found['error']}", "NCCL_DEBUG=INFO says more",
                       "NCCL_DEBUG=INFO python launch/doctor.py")
    return Finding("NCCL", "ok", f"{len(build.gpus)} GPUs of this machine" + (f", {found['gb_per_s']:.1f} GB/s" if len(build.gpus) > 1 else ""))


def _collective(backend: str, num: int, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num) as pool:
        found = list(pool.map(lambda rank: probe("collective", backend, str(rank), str(num), f"{folder}/store", device), range(num)))
    return next((one for one in found if "error" in one), found[0])


def disk(folder: Path) -> Finding:
    """Where runs are written: `folder`, or the nearest folder above it that is there."""
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("disk", "broken", f"{folder} cannot be written", "", "python launch/doctor.py --folder DIR    # where your runs will be")
    if free < 1 << 30:
        return Finding("disk", "broken", f"{folder} has {free / 2**30:.2f} GiB free, less than 1 GiB", "checkpoints would not fit")
    found = probe("disk", str(folder))
    if "error" in found:
        return Finding("disk", "broken", f"{folder}: {found['error']}")
    speed = f"{folder}: {found['write_gb_per_s']:.2f} GB/s written with fsync, {found['read_gb_per_s']:.2f} GB/s read, {free / 2**30:.0f} GiB free"
    if free < LITTLE_DISK:
        return Finding("disk", "instead", speed, "a checkpoint takes about 14 bytes per parameter in bf16; free some, or set checkpoint.keep_last")
    return Finding("disk", "ok", speed)


def shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("/dev/shm", "instead", "not there", "NCCL needs it between the GPUs of a machine",
                       "docker run --shm-size=8g ...    # or: mkdir -p /dev/shm && mount -t tmpfs -o size=8G tmpfs /dev/shm")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    if usage.free < LITTLE_SHM:
        return Finding("/dev/shm", "instead", found, "little: NCCL between the GPUs of a machine may fail with a bus error",
                       "docker run --shm-size=8g ...    # or: mount -o remount,size=8G /dev/shm")
    return Finding("/dev/shm", "ok", found)
