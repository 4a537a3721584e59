"""Manifests and the chain they form; progress lines and bars."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from data_tools import progress as progress_module, provenance
from data_tools.manifest import manifest_of, read_manifest, write_manifest
from data_tools.progress import Progress
from engine.data.indexed import DataError


def make_chain(folder):
    """raw.txt -> clean.txt -> corpus.bin and .idx, each with a manifest but the first."""
    for name, content in (("raw.txt", b"raw"), ("clean.txt", b"clean"), ("corpus.bin", b"tokens"), ("corpus.idx", b"index")):
        (folder / name).write_bytes(content)
    write_manifest(folder / "clean.txt", "filter", {"input": ["raw.txt"]}, [folder / "raw.txt"], [folder / "clean.txt"], {"documents_in": 3})
    outputs = [folder / "corpus.bin", folder / "corpus.idx"]
    write_manifest(folder / "corpus", "preprocess", {"workers": 2}, [folder / "clean.txt"], outputs, {"tokens": 6})


def test_manifest_holds_hashes_and_the_manifest_of_its_input(tmp_path):
    make_chain(tmp_path)
    content = read_manifest(tmp_path / "corpus.manifest.json")
    assert content["outputs"] == [
        {"path": f"corpus.{kind}", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for kind, data in (("bin", b"tokens"), ("idx", b"index"))
    ]
    earlier = hashlib.sha256((tmp_path / "clean.txt.manifest.json").read_bytes()).hexdigest()
    assert content["inputs"][0]["manifest"] == {"path": "clean.txt.manifest.json", "sha256": earlier}
    assert (content["tool"], content["arguments"], content["counts"]) == ("preprocess", {"workers": 2}, {"tokens": 6})
    assert content["libraries"]["numpy"] == sys.modules["numpy"].__version__
    assert manifest_of(tmp_path / "corpus.idx") == manifest_of(tmp_path / "corpus") == tmp_path / "corpus.manifest.json"
    assert manifest_of(tmp_path / "raw.txt") is None
    assert not list(tmp_path.glob("*.tmp*"))


def test_chain_is_printed_and_survives_a_move(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    make_chain(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert provenance.main([str(tmp_path / "b" / "corpus")]) == 0
    out = capsys.readouterr().out
    assert out.index("preprocess") < out.index("input clean.txt") < out.index("    filter") < out.index("input raw.txt: 3 bytes")
    assert out.count(", ok") == 5 and "documents_in=3" in out
    (tmp_path / "b" / "raw.txt").unlink()
    assert provenance.main([str(tmp_path / "b" / "corpus")]) == 0  # raw files are often deleted
    assert "input raw.txt: 3 bytes, sha256" in (out := capsys.readouterr().out) and ", gone" in out


@pytest.mark.parametrize("name, content, words", [
    ("raw.txt", b"war", "raw.txt: its SHA-256 differs"),
    ("corpus.bin", b"token", "corpus.bin has 5 bytes"),
    ("clean.txt.manifest.json", None, "was made again since"),
    ("corpus.idx", "delete", "corpus.idx is gone"),
])  # fmt: skip
def test_what_changed_is_named(tmp_path, capsys, name, content, words):
    make_chain(tmp_path)
    path = tmp_path / name
    if content == "delete":
        path.unlink()
    else:
        path.write_bytes(content if content is not None else path.read_bytes().replace(b"documents_in", b"documents_IN"))
    assert provenance.main([str(tmp_path / "corpus.manifest.json")]) == 1
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_quick_reads_no_contents(tmp_path):
    make_chain(tmp_path)
    (tmp_path / "raw.txt").write_bytes(b"war")
    assert provenance.main([str(tmp_path / "corpus"), "--quick"]) == 0


def test_what_is_no_manifest_is_an_error(tmp_path, capsys):
    (tmp_path / "x.manifest.json").write_text("{")
    (tmp_path / "y.manifest.json").write_text("[1]")
    for name, words in (("x", "not a manifest"), ("y", "manifest format None, expected 1"), ("z", "there is no")):
        assert provenance.main([str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot open"):
        read_manifest(tmp_path / "none")


def test_progress_writes_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    with Progress("filter", total_bytes=30_000_000) as progress:
        for second in range(1, 25):
            now[0] = float(second)
            progress.add(num_bytes=1_000_000, num_documents=100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "filter: 10.0 of 30.0 MB, 1.0 MB/s; 1,000 documents, 100/s; 0:00:20 left",
        "filter: 20.0 of 30.0 MB, 1.0 MB/s; 2,000 documents, 100/s; 0:00:10 left",
    ]
    assert (progress.num_bytes, progress.num_documents, progress.num_tokens) == (24_000_000, 2400, 0)


def test_quiet_progress_counts_and_says_nothing(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    with Progress("filter", total_bytes=None, quiet=True) as progress:
        now[0] = 100.0
        progress.add(num_tokens=5)
    assert capsys.readouterr().err == "" and progress.num_tokens == 5


def test_a_terminal_gets_a_bar():
    """In a process of its own with a pseudo-terminal as stderr."""
    import pty

    code = (
        "import data_tools.progress as p; p.SECONDS_BETWEEN_FRAMES = 0\n"
        "with p.Progress('dedup', 2000000) as bar:\n    bar.add(num_bytes=1000000)\n    bar.add(num_bytes=1000000, num_documents=7)\n"
    )
    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=slave, env=os.environ | {"COLUMNS": "150", "TERM": "xterm"})
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0 and "dedup" in shown and "2.0 of 2.0 MB" in shown and "7 documents" in shown


def test_progress_imports_no_rich_in_a_log():
    code = "import sys, data_tools.progress as p\nwith p.Progress('x', 1) as bar: bar.add(1)\nassert 'rich' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_arguments_of_any_type_are_written(tmp_path):
    (tmp_path / "o").write_bytes(b"")
    path = write_manifest(tmp_path / "o", "tool", {"path": tmp_path, "none": None}, [], [tmp_path], {})
    assert json.loads(path.read_text())["arguments"] == {"path": str(tmp_path), "none": None}
