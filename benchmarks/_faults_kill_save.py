"""kill -9 at random moments while two ranks save: is there always a checkpoint to go on from, and is it right?

Half of the cases begin in an empty folder, half have an older checkpoint; in every other one the save is asynchronous, and the ranks go on
changing what is being saved. One rank is killed and the other a moment later, or both at once. Usable means: the newest verified checkpoint is the
older one or the new one (none, in a folder that was empty), and every number in it is of its step.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

CASES = 100
NUM_RANKS = 2
NUMBERS = 3_000_000  # fp32, in all; large enough for the moments between the files to be hit too


def run(cases: int, seed: int) -> int:
    import torch  # noqa: F401  the ranks are forks of this process, so that each need not import megatron again

    from engine.mcore import saving_run  # noqa: F401

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        usual = sum(_case(Path(folder) / f"whole{i}", True, i == 1, None, rng)[1] for i in range(4)) / 4
        found = Counter()
        for case in range(cases or CASES):
            has_older, is_async = bool(case % 2), bool(case // 2 % 2)
            found[has_older, _case(Path(folder) / str(case), has_older, is_async, rng.uniform(0, usual), rng)[0]] += 1
    wrong = sum(n for (_, what), n in found.items() if what.startswith("wrong"))
    for has_older in (False, True):
        words = ", ".join(f"{n} {what}" for (older, what), n in sorted(found.items()) if older == has_older)
        print(f"| kill -9 in a save, {'with an older checkpoint' if has_older else 'in an empty folder'} | {words} |")
    print(f"| unusable states | {wrong} of {sum(found.values())} |")
    return int(bool(wrong))


def parts(step: int, num_numbers: int, also: tuple[str, ...] = ()) -> list:
    """What a checkpoint may consist of: tensors that hold the step, whole and in shards, an object of each rank, and small files."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from engine.mcore.saving_plan import Part

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    rows = max(num_numbers // 800, 1)
    split = torch.full((rows, 100), float(step))
    whole = torch.full((rows, 100), float(step))
    state = {
        **{f"split{i}": ShardedTensor.from_rank_offsets(f"split{i}", split.clone(), (0, rank, num_ranks)) for i in range(4 // num_ranks)},
        **{f"whole{i}": ShardedTensor.from_rank_offsets(f"whole{i}", whole.clone(), replica_id=rank) for i in range(4)},
        "object": ShardedObject("object", {"step": step}, (num_ranks,), (rank,)),
        "step": step,
    }
    small = {"config.yaml": f"step: {step}\n", "position.json": f'{{"step": {step}}}'}
    return [Part("", state, {**small, "stage.json": "{}"}), *(Part(folder, dict(state), dict(small)) for folder in also)]


def _case(root: Path, has_older: bool, is_async: bool, delay: float | None, rng: random.Random) -> tuple[str, float]:
    """(what is found afterwards, seconds from the beginning of the save to its end). delay: seconds until the kill; None lets it end."""
    root.mkdir()
    begun, telling = os.pipe()
    children = [_fork(rank, root, has_older, is_async, telling) for rank in range(NUM_RANKS)]
    os.close(telling)
    os.read(begun, 1)
    started = time.monotonic()
    if delay is not None:
        time.sleep(delay)
        rng.shuffle(children)
        for child in children:
            _kill(child)
            time.sleep(rng.choice((0, 0.05)))
    os.read(begun, 1)  # or nothing, when they are dead
    seconds = time.monotonic() - started
    for child in children:
        os.waitpid(child, 0)
    os.close(begun)
    return _found(root, has_older), seconds


def _kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the save ended before


def _fork(rank: int, root: Path, has_older: bool, is_async: bool, telling: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _save(rank, root, has_older, is_async, telling)
    finally:
        os._exit(0)


def _save(rank: int, root: Path, has_older: bool, is_async: bool, telling: int) -> None:
    """A rank: save step 1, tell the parent, save step 2 and tell it again; asynchronously the tensors change meanwhile, as soon as they may."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from engine.mcore import saving, saving_run
    from engine.safety_sections import Checkpoint

    dist.init_process_group("gloo", store=dist.FileStore(f"{root}.store", NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    if has_older:
        saving.save(root / "iter_0000001", parts(1, NUMBERS))
    saver = saving_run.Saver(Checkpoint(async_save=is_async), 5, note=lambda text: None)
    contents = parts(2, NUMBERS)
    tensors = [value.data for value in nested_values(contents[0].state) if hasattr(value, "dtype")]
    dist.barrier()
    if rank == 0:
        os.write(telling, b"!")
    saver.save({root / "iter_0000002": contents})
    saver.copied()
    for tensor in tensors:
        tensor += 1
    saver.finish()
    if rank == 0:
        os.write(telling, b"!")
    dist.barrier()


def _found(root: Path, has_older: bool) -> str:
    from engine import run_folder

    words: list[str] = []
    folder = run_folder.newest_verified(root, note=words.append)
    if words:
        return f"wrong: {words[0]}"  # nothing is a checkpoint by name that is none
    if folder is None:
        return "wrong: the older one is gone" if has_older else "without one yet"
    step = run_folder.step_of(folder)
    return {1: "on the older", 2: "on the new one"}[step] if _is_right(folder, step) else f"wrong: numbers in {folder.name}"


def _is_right(folder: Path, step: int) -> bool:
    from engine.mcore import stream

    metadata = stream.read_metadata(folder)
    tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    return len(tensors) >= 5 and all((stream.read(folder, metadata, key, (0, 0), tuple(entry.size)) == step).all() for key, entry in tensors.items())
