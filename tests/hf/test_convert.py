"""launch/convert.py: instant help, exit codes without tracebacks, and both directions proved end to end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def convert():
    """launch/convert.py as a module; its main runs in this process, which has transformers and megatron loaded."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_is_instant():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "launch/convert.py", "to-hf", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--tokenizer" in done.stdout
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("words,message", [
    (["from-hf", "nowhere", "out"], "no folder nowhere"),
    (["from-hf", "tests", "tests"], "exists already"),
    (["to-hf", "tests", "out", "--tolerance", "0"], "positive"),
    (["to-hf", "tests"], "required"),
    ([], "required"),
])
def test_usage_errors_are_2(convert, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        convert.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_bad_folder_is_1_without_a_traceback(convert, tmp_path, capsys):
    pytest.importorskip("engine.mcore.checkpoint")
    (tmp_path / "model").mkdir()
    assert convert.main(["from-hf", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt2_untied"])  # a save takes seconds
def test_there_and_back(convert, tiny, name, tmp_path, capsys):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf.load import open_hf

    model = tiny(name)
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    assert convert.main(["from-hf", str(model.folder), str(ckpt)]) == 0
    assert convert.main(["to-hf", str(ckpt), str(out)]) == 0
    assert capsys.readouterr().out.count("differ by at most") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]
    _, tensors = open_hf(out)
    assert all(torch.equal(tensors[name], model.tensors[name]) for name in model.tensors)
    assert "differ by at most" in (out / "README.md").read_text()


def test_disagreement_is_kept_aside(convert, tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf import names

    model = tiny("llama")
    monkeypatch.setattr(names, "fuse_qkv", lambda model, q, k, v: torch.cat([q, k, v]))
    assert convert.main(["from-hf", str(model.folder), str(tmp_path / "ckpt")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.failed"]
    assert "differ by at most" in (err := capsys.readouterr().err) and "ckpt.failed" in err and "Traceback" not in err


def test_the_dtype_asked_for_is_not_held_against_the_conversion(convert, tiny, tmp_path):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf.load import open_hf

    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in open_hf(tmp_path / "out")[1].values()} == {torch.bfloat16}
