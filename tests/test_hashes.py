"""engine/hashes.py: what was written is what is there, or the file is named."""

import json
import random

import pytest

from engine import hashes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "roles").mkdir()
    for name, size in (("a.bin", 3000), ("roles/b.bin", 9), ("empty", 0)):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(size))
    hashes.write(tmp_path)
    return tmp_path


def test_an_unchanged_folder(folder):
    assert hashes.check(folder) == []
    (folder / "later.txt").write_text("harms nobody")
    assert hashes.check(folder) == []
    assert sorted(json.loads((folder / hashes.NAME).read_text())["files"]) == ["a.bin", "empty", "roles/b.bin"]


def test_every_flipped_bit_is_found_and_its_file_named(folder):
    path, whole = folder / "roles/b.bin", (folder / "roles/b.bin").read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes((int.from_bytes(whole, "big") ^ (1 << bit)).to_bytes(len(whole), "big"))
        problem, = hashes.check(folder)
        assert "roles/b.bin has other bytes" in problem
        assert hashes.check(folder, contents=False) == []


def test_missing_and_cut_short(folder):
    (folder / "empty").unlink()
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-1])
    for contents in (True, False):
        assert sorted(hashes.check(folder, contents)) == ["a.bin has 2999 bytes, 3000 were written", "empty is missing"]


@pytest.mark.parametrize("text, says", [
    ("{", "no list of hashes"), ("[]", "no list of hashes"), ('{"algorithm": "md5", "files": {}}', "'md5', expected xxh3_128"),
    ('{"algorithm": "xxh3_128", "files": {"../x": {"bytes": 0, "hash": ""}}}', "outside the folder"),
    ('{"algorithm": "xxh3_128", "files": {"/etc/passwd": {"bytes": 0, "hash": ""}}}', "outside the folder"),
], ids=["cut", "list", "algorithm", "parent", "absolute"])
def test_a_list_that_is_none(folder, text, says):
    (folder / hashes.NAME).write_text(text)
    problem, = hashes.check(folder)
    assert says in problem


def test_without_a_list_nothing_is_said(tmp_path):
    assert hashes.check(tmp_path) == []


def test_a_list_with_a_flipped_bit_is_found(folder):
    whole = (folder / hashes.NAME).read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        (folder / hashes.NAME).write_bytes((int.from_bytes(whole, "big") ^ (1 << bit)).to_bytes(len(whole), "big"))
        problem, = hashes.check(folder)
        assert problem.startswith(hashes.NAME)


def test_hashed_while_written(tmp_path):
    data = random.Random(0).randbytes(hashes.BLOCK + 3 * hashes.SMALL)
    cuts = [0, 1, hashes.SMALL, 2 * hashes.SMALL, 2 * hashes.SMALL + 7, len(data)]
    with hashes.HashedFile(tmp_path / "file") as file:
        assert sum(file.write(data[a:b]) for a, b in zip(cuts, cuts[1:])) == file.tell() == len(data)
    assert (tmp_path / "file").read_bytes() == data
    hashes.write_list(tmp_path, {"file": file.entry})
    assert file.entry["bytes"] == len(data) and hashes.check(tmp_path) == []


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    monkeypatch.setattr(hashes, "_hash", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")) if path.name == "a.bin" else "")
    assert "a.bin cannot be read ([Errno 5] Input/output error)" in hashes.check(folder)
