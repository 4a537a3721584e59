"""launch/doctor.py: what is there is found, what is half there is told apart from it, and its exit code says whether training can run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import doctor
from engine.doctor import parts

ROOT = Path(__file__).parents[1]
NO_GPU, GPU = parts.Build(None, (), True), parts.Build("13.0", ("NVIDIA H100",), True)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder whose packages are found first, here and in the processes that look."""
    for name in ("transformer_engine", "apex"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # engine.mcore hides it from a process without a GPU
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def package(name: str, text: str = "") -> None:
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(text)
        importlib.invalidate_caches()

    return package


def test_the_whole_screen_of_this_machine(tmp_path):
    done = subprocess.run([sys.executable, "launch/doctor.py", "--json", "--folder", str(tmp_path / "runs" / "one")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert told["can_train"]
    found = {finding["name"]: finding for finding in told["findings"]}
    assert tuple(found) == parts.ORDER
    assert {found[name]["state"] for name in ("Python", "packages", "torch", "megatron-core", "C++ core", "gloo")} == {"ok"}
    assert str(tmp_path) in found["disk"]["found"] and "GB/s" in found["disk"]["found"]
    assert not list(tmp_path.iterdir()), "the file that measured the disk is gone, and no folder was made"


def test_without_torch_training_cannot_run(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = subprocess.run([sys.executable, "launch/doctor.py"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "!! torch" in done.stdout and "libcudart.so.13" in done.stdout and "$ pip install -c constraints.txt torch" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Training cannot run: ")


def test_transformer_engine_without_its_libraries_is_half_installed(site):
    site("transformer_engine")
    site("transformer_engine.pytorch", "raise RuntimeError('cudnn64_9 not found')")
    found = parts.transformer_engine(GPU)
    assert found.state == "instead" and "half installed" in found.found and "RuntimeError: cudnn64_9 not found" in found.found
    assert "train.backend=auto takes the torch layers" in found.instead and "'.[gpu]'" in found.cure


def test_transformer_engine_may_lean_on_the_libraries_that_torch_brings(site):
    site("transformer_engine")
    site("transformer_engine.pytorch", "import sys\nif 'torch' not in sys.modules: raise OSError('libnccl.so.2: cannot open shared object file')")
    assert parts.transformer_engine(GPU).state == "ok"


def test_a_package_that_ends_the_process_ends_only_the_probe(site):
    site("transformer_engine")
    site("transformer_engine.pytorch", "import os, sys; print('undefined symbol: cublasLt', file=sys.stderr, flush=True); os._exit(134)")
    found = parts.transformer_engine(GPU)
    assert "code 134" in found.found and "undefined symbol: cublasLt" in found.found


GUIDE = (ROOT / "docs/gpu.md").read_text().replace(".venv/bin/", "")


@pytest.mark.parametrize("build", [NO_GPU, GPU, parts.Build("12.9", ("NVIDIA H100",), True)], ids=["no GPU", "CUDA 13", "CUDA 12"])
@pytest.mark.parametrize("is_half", [False, True], ids=["absent", "half"])
def test_what_is_missing_has_the_command_of_the_guide_on_any_machine(site, monkeypatch, build, is_half):
    monkeypatch.setattr(parts, "version", lambda package: None)
    if is_half:
        site("transformer_engine")
        site("transformer_engine.pytorch", "raise ImportError('libnccl.so.2')")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for found in (parts.transformer_engine(build), parts.dali(build)):
        command = found.cure.split("    #")[0]
        assert f"`{command}`" in GUIDE and found.state == "instead", found
        assert ("of use on a GPU only" in found.cure) == (not build.gpus)
    assert ("half installed" in parts.transformer_engine(build).found) == is_half
    assert ("core_cu12" in parts.transformer_engine(build).cure) == (build.cuda == "12.9")


def test_a_dali_that_cannot_be_imported_has_its_command_without_a_gpu(site, monkeypatch):
    site("nvidia")
    site("nvidia.dali", "raise ImportError('libcuda.so.1')")
    monkeypatch.setattr(parts, "version", lambda package: "2.4.0" if package == "nvidia-dali-cuda130" else None)
    assert "--force-reinstall nvidia-dali-cuda130    # of use on a GPU only" in parts.dali(NO_GPU).cure


def test_extras_and_shared_memory_that_are_missing_have_commands(monkeypatch):
    monkeypatch.setattr(parts, "_requirements", lambda extra: [])
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert parts.extras().cure.startswith("make setup") and "--shm-size" in parts.shared_memory().cure


def test_the_apex_of_the_index_is_another_project(site):
    site("apex", "name = 'a web toolkit'")
    found = parts.apex(NO_GPU)
    assert found.state == "instead" and "another project" in found.found and found.cure == "pip uninstall apex"
    site("apex.normalization")
    assert parts.apex(NO_GPU).state == "ok"


def test_another_release_of_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(parts, "version", lambda package: "0.17.0")
    found = parts.megatron()
    assert found.state == "broken" and "0.17.0" in found.found and found.cure.endswith("megatron-core==0.16.1")


def test_a_core_that_is_not_built(monkeypatch):
    monkeypatch.setattr(parts, "probe", lambda *arguments: {"error": "ImportError: cannot import name '_csrc' from 'engine'"})
    assert parts.core().state == "broken" and parts.core().found == "not built"


def test_the_core_finds_a_token_that_is_not_what_was_written(monkeypatch):
    from engine.data.indexed import IndexedCorpus
    from engine.doctor import inside

    gather = IndexedCorpus.gather

    def wrong(self, *args, **kwargs):
        tokens, segments = gather(self, *args, **kwargs)
        tokens[3, 5] += 1
        return tokens, segments

    assert inside.core("0")["tokens"] > 0
    monkeypatch.setattr(IndexedCorpus, "gather", wrong)
    with pytest.raises(ValueError, match="not those that were written"):
        inside.core("0")


def test_missing_packages_are_named(monkeypatch):
    there = parts.version
    monkeypatch.setattr(parts, "version", lambda package: None if package in ("orjson", "rensa") else there(package))
    assert parts.packages().state == "broken" and parts.packages().found == "missing: orjson"
    assert "[data] (preprocess, filter and object stores) lacks rensa" in parts.extras().found


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = parts.disk(tmp_path)
    assert found.state == "broken" and "--folder DIR" in found.cure


def test_a_full_disk_and_little_shared_memory(monkeypatch, tmp_path):
    usage = parts.shutil.disk_usage
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda path: usage(path)._replace(free=64 << 20, total=64 << 20))
    assert parts.disk(tmp_path).state == "broken" and "0.06 GiB free" in parts.disk(tmp_path).found
    assert parts.shared_memory().state == "instead" and "--shm-size" in parts.shared_memory().cure


def test_gpus_are_told_by_kind(monkeypatch):
    gpus = [{"name": "NVIDIA H100", "gib": 79.6, "capability": "9.0"}] * 8
    monkeypatch.setattr(parts, "probe", lambda *arguments: {"version": "2.13.0", "cuda": "13.0", "cudnn": 91400, "nccl": "2.28.3", "gpus": gpus})
    build, found = parts.torch_build()
    assert build == parts.Build("13.0", ("NVIDIA H100",) * 8, True)
    assert "8 x NVIDIA H100 (80 GiB, capability 9.0)" in found.found


def test_ranks_that_cannot_meet(monkeypatch):
    monkeypatch.setattr(parts, "probe", lambda *arguments: {"error": "RuntimeError: connect timeout"})
    assert parts.gloo(NO_GPU).state == "broken" and "GLOO_SOCKET_IFNAME" in parts.gloo(NO_GPU).instead
    assert parts.nccl(GPU).state == "broken" and parts.nccl(NO_GPU).state == "instead"


def test_the_screen_keeps_commands_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    long = "pip install " + "x" * 100
    text = doctor.screen([parts.Finding("torch", "broken", "not " * 30, "", long)])
    assert long in text and text.endswith("Training cannot run: torch")
    assert all(len(line) <= 60 for line in text.splitlines() if long not in line)
