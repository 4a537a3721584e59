"""engine/run_folder.py: which folder is a checkpoint, which is whole, which may go. No torch."""

import pytest

from engine import hashes, run_folder


def make(root, step, text="x"):
    folder = root / f"iter_{step:07d}"
    (folder / "roles").mkdir(parents=True)
    for name in ("metadata.json", "roles/big.distcp"):
        (folder / name).write_text(text)
    hashes.write(folder)
    return folder


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize("tracker", [None, "", "garbage", "99", "1\n"])
def test_the_tracker_decides_nothing(tmp_path, tracker):
    make(tmp_path / "checkpoints", 1)
    newest = make(tmp_path / "checkpoints", 2)
    if tracker is not None:
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert run_folder.find(tmp_path) == run_folder.newest_verified(tmp_path) == run_folder.newest_verified(tmp_path / "checkpoints") == newest


def test_the_newest_that_is_whole(tmp_path):
    folders = [make(tmp_path, step) for step in (9, 10, 11, 12345678)]
    words = []
    assert run_folder.newest_verified(tmp_path, at_most=11, note=words.append) == folders[2] and words == []
    flip(folders[3] / "roles" / "big.distcp")
    (folders[2] / hashes.NAME).unlink()
    (folders[1] / "metadata.json").unlink()
    assert run_folder.newest_verified(tmp_path, note=words.append) == folders[0]
    assert [word.startswith(f"{folder} is damaged and passed over: ") for word, folder in zip(words, folders[:0:-1])] == [True] * 3
    assert "roles/big.distcp has other bytes" in words[0] and "hashes.json is missing" in words[1] and "metadata.json is missing" in words[2]
    assert run_folder.newest_verified(tmp_path, at_most=8) is None


def test_find_looks_at_what_is_cheap(tmp_path):
    """Sizes of all, bytes of small files; a folder that has no list is taken, since tools of others write none."""
    older, newest = make(tmp_path, 1), make(tmp_path, 2, "x" * (run_folder.SMALL + 1))
    flip(newest / "roles" / "big.distcp")
    assert run_folder.find(tmp_path) == newest
    (newest / "roles" / "big.distcp").write_text("")
    assert run_folder.find(tmp_path) == older
    (newest / hashes.NAME).unlink()
    assert run_folder.find(tmp_path) == newest
    assert run_folder.find(older) == older


def test_what_is_left_half_written_is_no_checkpoint_and_goes(tmp_path):
    folder = make(tmp_path, 1)
    make(tmp_path, 2).rename(tmp_path / "iter_0000002.tmp")
    make(tmp_path, 3).rename(tmp_path / "iter_0000003.aside")
    (tmp_path / "iter_x").mkdir()
    assert run_folder.candidates(tmp_path) == [folder]
    run_folder.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000003.aside", "iter_x"]


@pytest.mark.parametrize("keep_last, keep_every, spared, left", [
    (0, 0, (), [1, 2, 3, 4, 5, 6]), (0, 2, (), [1, 2, 3, 4, 5, 6]), (1, 0, (), [5, 6]), (2, 0, (), [4, 5, 6]), (2, 2, (), [2, 4, 5, 6]),
    (9, 0, (), [1, 2, 3, 4, 5, 6]), (1, 0, (2,), [2, 5, 6]),
])
def test_what_is_kept(tmp_path, keep_last, keep_every, spared, left):
    """Of the checkpoints up to step 5; one after it is none of its business."""
    folders = {step: make(tmp_path, step) for step in range(1, 7)}
    gone = run_folder.retire(tmp_path, 5, keep_last, keep_every, [folders[step] for step in spared])
    assert [run_folder.step_of(folder) for folder in reversed(run_folder.candidates(tmp_path))] == left
    assert sorted(map(run_folder.step_of, gone)) == sorted({1, 2, 3, 4, 5, 6} - set(left))
    assert not list(tmp_path.glob("*.tmp"))
