"""When a folder may be called a checkpoint: written, on the disk, hashed, renamed, and only then named by the tracker.

    folder = save(root / "iter_0000100", parts)        # parts: of engine/mcore/saving_plan.py. Collective; raises SaveError
    folder = newest_verified(root)                     # collective: the ranks share the reading
    run = settled(run)                                 # collective: checkpoint.load and roles name the folders that are verified

All ranks write into final.tmp. They tell each other what has become of it through a key-value store of their own, so a thread may write
while the main one trains: no collective is in it. When every rank's files are on the disk rank 0 adds the descriptions and hashes.json, renames the folder and moves the tracker; at any other moment the folder is not a checkpoint.
Left out: what is in a checkpoint (checkpoint.py), and saves one after another, in the background (saving_run.py).
"""

import datetime
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from engine import hashes, run_folder
from engine.mcore import saving_plan
from engine.mcore.saving_plan import Part

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's name, so that its tools find ours
TIMEOUT_MINUTES = 30
_serials = itertools.count()


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model; the message names the folder and the cure."""


class SaveError(OSError):
    """A checkpoint that was not written: a full or failing disk. The message names the folder, the bytes and the cure."""


def save(final: Path, parts: list[Part], note: Callable[[str], None] = lambda text: None) -> Path:
    """Write a checkpoint. Collective. A verified one of the same name stays as it is, and `note` hears so. Raises SaveError, on all ranks alike."""
    outcome = Save(final, parts).write()
    if "failed" in outcome:
        raise error_of(outcome)
    if "kept" in outcome:
        note(outcome["kept"])
    return final


def error_of(outcome: dict) -> Exception:
    """The error that Save.write has answered with."""
    return SaveError(outcome["failed"]) if outcome["is_disk"] else RuntimeError(outcome["failed"])


class Save:
    """One checkpoint being written. Made by every rank's main thread; `write` runs in any thread."""

    def __init__(self, final: Path, parts: list[Part], timeout_minutes: float = TIMEOUT_MINUTES):
        self.final, self.temporary = final, final.with_name(f"{final.name}.tmp")
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.plan = saving_plan.divide(parts, next(_serials))
        store = _channel().clone()  # a connection of its own: another thread may be waiting on another one
        self._store = dist.PrefixStore(f"trireme/save/{self.plan.serial}", store)
        self._store.set_timeout(datetime.timedelta(minutes=timeout_minutes))

    def write(self) -> dict:
        """This rank's part in it. Returns what came of it, the same on every rank: {}, {"kept": why} or {"failed": why, "is_disk": bool}."""
        if self.rank == 0:
            outcome = caught(self.final, self._lead)
            if "failed" in outcome:
                shutil.rmtree(self.temporary, ignore_errors=True)
            self._tell("begun", outcome)  # where it has not begun; nobody reads it twice
            self._tell("outcome", outcome)
            return outcome
        begun = self._hear("begun")
        if not begun:
            self._tell(f"written/{self.rank}", caught(self.final, self._write_own))
        return self._hear("outcome")

    def _lead(self) -> dict:
        """Rank 0's part: make the folder, write, wait for the others, commit."""
        if self.final.exists() and not run_folder.problems(self.final):
            return {"kept": f"{self.final} is there already and verified; it is kept as it is"}
        root = self.final.parent
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._refuse_without_room(root)
        for below in self.plan.folders:
            (self.temporary / below).mkdir(parents=True)
        self._tell("begun", {})
        own = caught(self.final, self._write_own)
        written = [own, *(self._take(f"written/{rank}") for rank in range(1, self.num_ranks))]
        if failed := next((one for one in written if "failed" in one), None):
            return failed
        hashes.write_list(self.temporary, saving_plan.describe(self.temporary, self.plan, written))
        commit(self.temporary, self.final)
        return {}

    def _write_own(self) -> dict:
        return saving_plan.write_own(self.temporary, self.plan, self.rank)

    def _refuse_without_room(self, root: Path) -> None:
        free, needed = free_bytes(root), self.plan.num_bytes
        if free < needed:
            raise SaveError(_without_room(self.final, needed, free))

    def _tell(self, key: str, value: dict) -> None:
        self._store.set(key, json.dumps(value))

    def _hear(self, key: str) -> dict:
        return json.loads(self._store.get(key))

    def _take(self, key: str) -> dict:
        """_hear what is for nobody else: it may be long, and the store is not to grow."""
        found = self._hear(key)
        self._store.delete_key(key)
        return found


_opened: tuple = (None, None)  # the process group, and its channel


def _channel() -> dist.Store:
    """Where the ranks of the process group tell each other about saves. Collective. Not the group's own store: under torchrun that ends with
    the launcher, and when a launcher dies the ranks save."""
    global _opened
    group = dist.distributed_c10d._get_default_group()
    if _opened[0] is not group:
        _opened = group, _open_channel()
    return _opened[1]


def _open_channel() -> dist.Store:
    if dist.get_world_size() == 1:
        return dist.HashStore()
    place, store = [None], None
    if dist.get_rank() == 0:
        host = address_of_rank_0()
        listening = listen(host)
        place = [(host, listening.getsockname()[1])]
        store = dist.TCPStore(*place[0], is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    dist.broadcast_object_list(place, src=0)
    return store or dist.TCPStore(*place[0], is_master=False, wait_for_workers=False)


def address_of_rank_0() -> str:
    """By which all ranks reach it: the loopback one on one machine, else MASTER_ADDR, which every launcher sets."""
    is_alone = os.environ.get("LOCAL_WORLD_SIZE", "unknown") == os.environ.get("WORLD_SIZE")
    return "127.0.0.1" if is_alone else os.environ.get("MASTER_ADDR") or "127.0.0.1"


def listen(host: str) -> socket.socket:
    """A free port at this address; at all of the machine's where others know it by a name that means loopback here (/etc/hosts of Debian), or by
    an address that it does not have (a service's)."""
    try:
        found = socket.create_server((host, 0))
    except OSError:
        return socket.create_server(("", 0))
    if host in ("127.0.0.1", "localhost") or not found.getsockname()[0].startswith("127."):
        return found
    found.close()
    return socket.create_server(("", 0))


def free_bytes(folder: Path) -> int:
    """What a user may still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _without_room(final: Path, needed: int, free: int) -> str:
    return (f"{final} was not written: it needs {needed} bytes ({needed / 2**30:.2f} GiB), {final.parent} has {free} bytes free. Make room there, keep fewer "
            "checkpoints (checkpoint.keep_last), or move run.dir")


def caught(final: Path, act: Callable[[], dict]) -> dict:
    """What act() returns, or what stopped it."""
    try:
        return act()
    except SaveError as error:
        return {"failed": str(error), "is_disk": True}
    except OSError as error:
        return {"failed": f"{final} was not written on rank {dist.get_rank()}: {error}", "is_disk": True}
    except Exception as error:
        return {"failed": f"{final} was not written on rank {dist.get_rank()}: {type(error).__name__}: {error}", "is_disk": False}


def commit(temporary: Path, final: Path) -> None:
    """Make a checkpoint of a folder whose files are written and fsynced, hashes.json among them. One process."""
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        sync(folder)
    if final.exists():
        run_folder.set_aside(final)  # a verified one would have been kept
    temporary.rename(final)
    sync(final.parent)
    track(final.parent, run_folder.step_of(final))


def track(root: Path, step: int) -> None:
    """Move the tracker, whole or not at all."""
    temporary = root / f"{TRACKER}.tmp"
    with hashes.HashedFile(temporary) as file:
        file.write(f"{step}\n".encode())
    os.replace(temporary, root / TRACKER)
    sync(root)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder: the names in it are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- choosing --------------------------------------------------------------------------------------------------------


def newest_verified(root: str | Path, at_most: int | None = None, note: Callable[[str], None] = lambda text: None, beside: Path | None = None) -> Path | None:
    """run_folder.newest_verified, the same on every rank. Collective: the ranks share the reading. beside: a root whose folder of the same
    step, where there is one, must be whole as well."""
    for folder in _agreed(run_folder.candidates(root)):
        if at_most is None or run_folder.step_of(folder) <= at_most:
            found = problems(folder)
            if beside and _agreed((beside / folder.name).exists()):
                found += [f"{beside / folder.name}: {problem}" for problem in problems(beside / folder.name)]
            if not found:
                return folder
            note(run_folder.passed_over(folder, found))
    return None


def problems(folder: Path) -> list[str]:
    """run_folder.problems, the same on every rank. Collective."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, run_folder.problems(folder, part=dist.get_rank(), parts=len(found)))
    return list(dict.fromkeys(problem for one in found for problem in one))


def _agreed(value):
    """Rank 0's answer: a folder on a shared disk may look different for a moment."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def resume_from(root: Path, verify: bool, note: Callable[[str], None], beside: Path | None = None, at_most: int | None = None) -> Path | None:
    """The checkpoint of a run's own that it goes on from (of a step up to at_most); None where there is none. Collective. What dead runs have left half written
    is removed, and damaged folders that are newer are set aside: what the run writes from here on has their steps.

    verify: False takes the newest complete one as it is. Raises CheckpointError where there are checkpoints and none is good."""
    if dist.get_rank() == 0:
        for each in filter(None, (root, beside)):
            run_folder.sweep(each)
    found, words, folder = _agreed(run_folder.candidates(root)), [], None
    if found:
        folder = newest_verified(root, at_most, words.append, beside) if verify else _agreed(run_folder.find(root, check=False, at_most=at_most))
        if folder is None:
            raise CheckpointError(f"{root} holds no checkpoint that is as it was written: {'; '.join(words) or f'{found[0]} is incomplete'}. Restore "
                                  "one, remove them to begin anew, or set checkpoint.verify=false to load the newest complete one nevertheless")
    for word in words:
        note(word)
    for each in filter(None, (root, beside)):
        set_aside_newer(each, run_folder.step_of(folder) if folder else -1)
    return folder


def set_aside_newer(root: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which the run is to go through once more, to iter_N.aside. Collective."""
    if dist.get_rank() == 0:
        newer = [folder for folder in run_folder.candidates(root) if run_folder.step_of(folder) > step]
        for folder in newer:
            run_folder.set_aside(folder)
        if newer and (root / TRACKER).is_file() and (left := run_folder.candidates(root)):
            track(root, run_folder.step_of(left[0]))
    dist.barrier()


def settled(run, note: Callable[[str], None]):
    """The run with the iter_ folders that its checkpoint.load and checkpoint.roles mean, verified. Collective. A named folder that is damaged is
    an error; below a root the newest good one is taken, and `note` hears of others. Raises CheckpointError."""
    keys = {"checkpoint.load": run.checkpoint.load, **{f"checkpoint.roles.{name}": path for name, path in run.checkpoint.roles.items()}}
    meant: dict[str, str] = {}
    for key, path in keys.items():
        if path and path not in meant:
            meant[path] = str(_meant(key, Path(path), run.checkpoint.verify, note))
    chosen = run.checkpoint.model_copy(update={"load": meant.get(run.checkpoint.load, ""),
                                               "roles": {name: meant[path] for name, path in run.checkpoint.roles.items()}})
    return run.model_copy(update={"checkpoint": chosen})


def _meant(key: str, path: Path, verify: bool, note) -> Path:
    words: list[str] = []
    is_named = _agreed((path / "metadata.json").is_file() or run_folder.step_of(path) is not None)
    if not verify:
        found = _agreed(run_folder.find(path, check=False))
    elif is_named:
        words = problems(path)
        found = None if words else path
    else:
        found = newest_verified(path, note=words.append)
    if found is None and words:
        raise CheckpointError(f"{key}={path} is not as it was written: {'; '.join(words)}. Name another checkpoint, or set checkpoint.verify=false to "
                              "load it nevertheless")
    for word in words:
        note(f"{key}: {word}")
    return found or path  # whoever wants to read it says that nothing is there
