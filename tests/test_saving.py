"""Checkpoints on the disk: who writes what, when a folder counts, what a full disk does, and that an asynchronous save is a save."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from training import MOE, merged, on_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ROOT = Path(__file__).parents[1]
NUMBERS = 40_000  # of the tensors below, in all


# --- one save ----------------------------------------------------------------------------------------------------------


def saved_twice(root):
    """Two ranks save step 1, and step 1 once more; what was said, and (bytes in this rank's files, tensors that it wrote)."""
    import torch.distributed as dist
    from _faults_kill_save import parts

    from engine.mcore import saving, saving_plan

    words, final = [], Path(root) / "iter_0000001"
    saving.save(final, parts(1, NUMBERS, also=("roles/critic",)), words.append)
    written = (final / "metadata.json").stat().st_ino
    saving.save(final, parts(1, NUMBERS), words.append)
    assert (final / "metadata.json").stat().st_ino == written
    plan = saving_plan.divide(parts(1, NUMBERS))
    return words, sum(path.stat().st_size for path in final.glob(f"__{dist.get_rank()}_*.distcp")), plan.num_bytes


@pytest.mark.parametrize("environment, host", [
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node7"}, "127.0.0.1"), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node7"}, "node7"),
    ({"WORLD_SIZE": "8", "MASTER_ADDR": "node7"}, "node7"),
])
def test_the_ranks_meet_where_all_reach_it(monkeypatch, environment, host):
    from engine.mcore import saving

    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert saving.address_of_rank_0() == host


@pytest.mark.parametrize("known_as, listens_at", [("127.0.0.1", "127.0.0.1"), ("127.0.1.1", "0.0.0.0"), ("192.0.2.1", "0.0.0.0")])
def test_an_address_that_others_cannot_reach_is_none_to_listen_at(known_as, listens_at):
    """As Debian has the machine's own name, and as a service's address, which the machine itself does not have."""
    from engine.mcore import saving

    with saving.listen(known_as) as listening:
        assert listening.getsockname()[0] == listens_at


def test_two_ranks_write_a_checkpoint_that_others_read(tmp_path):
    """Each about half of the bytes, though half of the tensors are on both; a second save of the same step changes nothing."""
    import torch.distributed.checkpoint as dcp

    from engine import run_folder

    (words, first, needed), (other_words, second, _) = ranks.run(2, saved_twice, str(tmp_path))
    folder = tmp_path / "iter_0000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "latest_checkpointed_iteration.txt"]
    assert words == other_words == [f"{folder} is there already and verified; it is kept as it is"]
    assert abs(first - second) < 0.1 * first
    everything = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert everything <= needed <= everything + (200 << 10)      # what was asked of the disk before
    assert run_folder.problems(folder) == [] and json.loads((folder / "position.json").read_text()) == {"step": 1}
    for each in (folder, folder / "roles" / "critic"):
        state = {f"{kind}{i}": torch.zeros(100 if kind == "split" else 50, 100) for kind, num in (("split", 2), ("whole", 4)) for i in range(num)}
        dcp.load(state, checkpoint_id=each, no_dist=True)
        assert all((tensor == 1).all() for tensor in state.values())


def gap(root):
    """Rank 1 names a shard that rank 0 has as well, so that one is missing."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from engine.mcore import saving
    from engine.mcore.saving_plan import Part

    half = ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3), (0, 0, 2), replica_id=dist.get_rank())
    try:
        saving.save(Path(root) / "iter_0000001", [Part("", {"w": half})])
    except ValueError as error:
        return str(error)


def test_shards_that_do_not_make_up_a_tensor_are_refused(tmp_path):
    assert ranks.run(2, gap, str(tmp_path)) == ["the ranks' shards do not make up the tensors: w has 6 of 12 numbers"] * 2
    assert list(tmp_path.iterdir()) == []


# --- a disk that is full -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where this user may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def while_full(root, is_async, looks_free):
    """Save steps 1 to 4; nearly all of the disk is taken during 2 and 3. Returns what was said, and the checkpoints that are there after each."""
    import torch.distributed as dist
    from _faults_kill_save import parts

    from engine import run_folder
    from engine.mcore import saving, saving_run
    from engine.safety_sections import Checkpoint

    words, there, ballast = [], [], Path(root) / "ballast"
    saver = saving_run.Saver(Checkpoint(async_save=is_async, failures_allowed=1), 5, words.append)
    honest, error = saving.free_bytes, None
    for step in range(1, 5):
        if dist.get_rank() == 0 and step == 2:
            ballast.write_bytes(b"x" * (honest(Path(root)) - 100_000))
            if looks_free:                              # as when somebody else fills the disk while we write
                saving.free_bytes = lambda folder: 1 << 40
        if dist.get_rank() == 0 and step == 4:
            ballast.unlink()
        dist.barrier()
        try:
            saver.save({Path(root) / f"iter_{step:07d}": parts(step, NUMBERS * 10)})
            saver.finish()
        except saving.SaveError as found:
            error = (step, str(found))
        there.append([run_folder.step_of(folder) for folder in run_folder.candidates(root) if not run_folder.problems(folder)])
        dist.barrier()
    saving.free_bytes = honest
    return words, there, error, [path.name for path in Path(root).glob("*.tmp")]


@pytest.mark.parametrize("is_async, looks_free", [(False, False), (True, True)], ids=["seen before", "found while writing, asynchronous"])
def test_a_full_disk(small_disk, is_async, looks_free):
    """Told with what is needed; the older checkpoint stays, training goes on; the second time in a row is one too many; later saves work."""
    answers = ranks.run(2, while_full, str(small_disk), is_async, looks_free)
    words, there, error, left = answers[0]
    assert [answer[2] for answer in answers] == [error] * 2 and answers[1][0] == words
    assert there == [[1], [1], [1], [4, 1]] and left == []
    assert [word.startswith("saved") for word in words] == [True, False, False, True]
    says = os.strerror(errno.ENOSPC) if looks_free else \
        r"it needs 16\d{5} bytes \(0.00 GiB\), .* has \d+ bytes free. Make room there, keep fewer checkpoints \(checkpoint.keep_last\), or move run.dir"
    assert re.search(f"iter_0000002 was not written.*{says}", words[1]) and error == (3, words[2])


# --- asynchronous ------------------------------------------------------------------------------------------------------


def both_ways(raw, world_size, roots):
    """Train; after step 1 save once synchronously and once asynchronously, and train on while the second is held back."""
    import threading

    from engine.config import validate
    from engine.mcore import checkpoint, saving, saving_run, topology
    from engine.mcore.checkpoint import Position
    from engine.mcore.run import ParallelModel
    from engine.safety_sections import Checkpoint
    from engine.stages import build_stage

    run = validate(raw, world_size)
    model = ParallelModel(run, topology.start(run), build_stage(run.stage), "policy")
    saver, go_on, order = saving_run.Saver(Checkpoint(async_save=True), 5, lambda text: None), threading.Event(), []
    copy = saving_run._copy

    def held_back(waiting):
        assert go_on.wait(60)
        copy(waiting)
        order.append("copied")

    def train():
        model.forward_backward(batches(run, world_size))
        go_on.set()                       # only now may the copies be made: the pass above is behind us
        saver.copied()
        order.append("changed")
        model.step(0.1)

    saving_run._copy = held_back
    try:
        for step in (1, 2):               # the second uses the buffer again
            order.clear()
            train()
            go_on.clear()
            sync, late = (checkpoint.contents(model, Position(step)) for _ in range(2))
            saving.save(checkpoint.folder_of(roots[0], step), sync)
            saver.save({checkpoint.folder_of(roots[1], step): late})
            memory = saver.staging._memory.data_ptr()
            train()
            assert order[-2:] == ["copied", "changed"]
            saver.finish()
        assert saver.staging._memory.data_ptr() == memory
    finally:
        saving_run._copy = copy


def batches(run, world_size):
    torch.manual_seed(0)
    tokens = torch.randint(0, 61, (2, run.train.seq_len + 1))
    positions = torch.arange(run.train.seq_len).repeat(2, 1)
    return [{"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(2, run.train.seq_len), "position_ids": positions}]


@pytest.mark.parametrize("change", [{"parallel": {"zero1": True}, "train": {"precision": "bf16"}},
                                    {"parallel": {"tp": 2, "sequence_parallel": True}, "model": {"moe": {**MOE, "balance": "aux_free", "score": "sigmoid"}}}],
                         ids=["bf16 zero1", "tp2 moe bias"])
def test_an_asynchronous_save_is_bit_equal_while_training_goes_on(raw_run, tmp_path, change):
    roots = [str(tmp_path / name) for name in ("sync", "async")]
    ranks.run(2, both_ways, merged(raw_run, change), 2, roots)
    for step in (1, 2):
        one, other = (Path(root, f"iter_{step:07d}", "hashes.json").read_text() for root in roots)
        assert one == other


# --- a run -------------------------------------------------------------------------------------------------------------


def numbers(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_that_saves_in_the_background(raw_run, tmp_path):
    """The same losses and the same last checkpoint as one that does not; old checkpoints go, with the averages of their steps; and a resume from
    what is left is bit-equal."""
    raw = merged(raw_run, {"average": {"kind": "uniform", "start": 0.1}, "checkpoint": {"save_every": 1}})
    plain, quiet = (merged(raw, {"run": {"dir": str(tmp_path / name)}}) for name in ("plain", "quiet"))
    quiet = merged(quiet, {"checkpoint": {"async_save": True, "keep_last": 2, "keep_every": 3}})
    expected = numbers(on_ranks(2, plain))
    on_ranks(2, merged(quiet, {"train": {"steps": 4}, "schedule": {"decay_steps": 6}}))
    there = lambda root: sorted(path.name for path in (tmp_path / "quiet" / root).glob("iter_*"))  # noqa: E731
    assert there("checkpoints") == there("average") == ["iter_0000003", "iter_0000004"]
    assert numbers(on_ranks(2, quiet)) == expected
    assert there("checkpoints") == there("average") == ["iter_0000003", "iter_0000005", "iter_0000006"]
    for root in ("checkpoints", "average"):
        one, other = (json.loads((tmp_path / name / root / "iter_0000006" / "hashes.json").read_text())["files"] for name in ("plain", "quiet"))
        assert {name: entry for name, entry in one.items() if name != "config.yaml"} == {name: entry for name, entry in other.items() if name != "config.yaml"}
    log = next((tmp_path / "quiet" / "logs").glob("rank_00000*")).read_text()
    assert log.count("saved ") == 12


# --- which one is loaded -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """checkpoints/ of steps 1 and 2, written by this process."""
    from _faults_kill_save import parts

    from engine.mcore import saving, topology

    topology.start_single()
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    for step in (1, 2):
        saving.save(root / f"iter_{step:07d}", parts(step, 500))
    return root


@pytest.fixture
def root(two, tmp_path):
    shutil.copytree(two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def cut(folder, name="__0_0.distcp"):
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def meant(raw_run, **checkpoint):
    from engine.config import validate
    from engine.mcore import saving

    words = []
    return saving.settled(validate(merged(raw_run, {"checkpoint": checkpoint})), words.append).checkpoint, words


def test_what_checkpoint_load_means(raw_run, root):
    from engine.mcore.saving import CheckpointError

    older, newest = root / "iter_0000001", root / "iter_0000002"
    assert meant(raw_run)[0].load == ""
    for path in (root, root.parent, newest):
        found, words = meant(raw_run, load=str(path), roles={"reference": str(older)})
        assert (found.load, found.roles, words) == (str(newest), {"reference": str(older)}, [])
    cut(newest)
    found, (word,) = meant(raw_run, load=str(root))
    assert found.load == str(older) and word.startswith(f"checkpoint.load: {newest} is damaged and passed over: __0_0.distcp has ")
    with pytest.raises(CheckpointError, match=rf"checkpoint.roles.reference={newest} is not as it was written: __0_0.distcp has .* Name another"):
        meant(raw_run, roles={"reference": str(newest)})
    assert meant(raw_run, load=str(newest), verify=False)[0].load == str(newest)
    cut(older)
    with pytest.raises(CheckpointError, match=rf"checkpoint.load={root} is not as it was written: .*iter_0000002 .*iter_0000001 "):
        meant(raw_run, load=str(root))


def test_what_a_run_resumes(root, tmp_path):
    from engine.mcore import saving

    older, newest = root / "iter_0000001", root / "iter_0000002"
    words, beside = [], tmp_path / "average"
    (root / "iter_0000003.tmp").mkdir()
    assert saving.resume_from(tmp_path / "nothing", True, words.append) is None
    assert saving.resume_from(root, True, words.append) == newest and words == [] and not (root / "iter_0000003.tmp").exists()
    shutil.copytree(newest, beside / "iter_0000002")
    cut(beside / "iter_0000002", "config.yaml")
    assert saving.resume_from(root, True, words.append, beside) == older
    assert len(words) == 1 and f"{beside / 'iter_0000002'}: config.yaml has" in words[0]
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "iter_0000002.aside", "latest_checkpointed_iteration.txt"]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "1\n" and [path.name for path in beside.iterdir()] == ["iter_0000002.aside"]
    cut(older)
    with pytest.raises(saving.CheckpointError, match="holds no checkpoint that is as it was written: .*__0_0.distcp has .*Restore one, remove them to begin"):
        saving.resume_from(root, True, words.append)
    assert saving.resume_from(root, False, words.append) == older


# --- campaigns, short ----------------------------------------------------------------------------------------------------


def test_damage_of_every_kind_of_file_is_found(root):
    import random

    from _faults_damage import damaged

    tried, missed = damaged(root, 200, random.Random(0))
    assert missed == [] and sum(tried.values()) == 200
    assert {name for _, name in tried} >= {"hashes.json", ".metadata", "common.pt", "metadata.json", "__0_1.distcp", "stage.json", "config.yaml"}


def test_killed_while_saving():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/faults.py"), "kill_save", "--cases", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "| unusable states | 0 of 4 |" in done.stdout, done.stdout + done.stderr
