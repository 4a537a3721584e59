"""Where things lie in a run's folder, known without torch: the checkpoints, which of them are whole, and which may go.

    folder = find(path)                             # the newest complete checkpoint below path
    folder = newest_verified(root, note=print)      # the newest whose every byte is the one that was written
    retire(root, step, keep_last, keep_every)       # delete older ones

A checkpoint is complete when it has its name (iter_0000100) and metadata.json, and verified when every file in it has the size and
hash that hashes.json lists. Folders with an ending (.tmp, .aside) are none. Left out: ranks (engine/mcore/saving.py).
"""

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from engine import hashes

SMALL = 1 << 20  # bytes: files up to this size are checked even where reading a whole checkpoint would take too long
_NAME = re.compile(r"iter_(\d{7,})")


def find(path: str | Path, check: bool = True, at_most: int | None = None) -> Path | None:
    """The checkpoint folder that `path` means: itself, or the newest complete one below it (of a step up to at_most); None if there is none. A folder below it
    whose files are not there as listed (sizes, and the bytes of small files) is passed over, unless `check` is False."""
    path = Path(path)
    if (path / "metadata.json").is_file():
        return path
    complete = (folder for folder in candidates(path) if (folder / "metadata.json").is_file() and (at_most is None or step_of(folder) <= at_most))
    return next((folder for folder in complete if not (check and problems(folder, quick=True, strict=False))), None)


def candidates(path: str | Path) -> list[Path]:
    """The checkpoints that a run's folder or its checkpoints/ may hold by their names, newest first."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    return sorted((f for f in path.glob("iter_*") if step_of(f) is not None), key=step_of, reverse=True) if path.is_dir() else []


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def problems(folder: Path, quick: bool = False, strict: bool = True, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; empty when it is verified.

    quick: sizes of all files, but the bytes of small ones alone. strict: a folder without hashes.json cannot be verified. part, parts:
    look at every parts-th file, from the part-th on, so that ranks share the reading.
    """
    missing = [name for name in ("metadata.json", hashes.NAME)[:1 + strict] if not (folder / name).is_file()]
    if missing:
        return [f"{name} is missing" for name in missing]
    mine = lambda number, name: number % parts == part  # noqa: E731
    if not quick:
        return hashes.check(folder, only=mine)
    is_small = lambda number, name: mine(number, name) and _size(folder / name) <= SMALL  # noqa: E731
    return hashes.check(folder, contents=False, only=mine) or hashes.check(folder, only=is_small)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def newest_verified(path: str | Path, at_most: int | None = None, note: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint below `path` (of a step up to at_most) whose every byte is the one that was written; None without any.
    note: hears of each folder that is passed over and why. For one process: ranks ask engine/mcore/saving.py."""
    for folder in candidates(path):
        if at_most is None or step_of(folder) <= at_most:
            if not (found := problems(folder)):
                return folder
            note(passed_over(folder, found))
    return None


def passed_over(folder: Path, found: list[str]) -> str:
    """The word about a checkpoint that cannot be used."""
    return f"{folder} is damaged and passed over: {'; '.join(found[:3])}{f'; and {len(found) - 3} more' if len(found) > 3 else ''}"


def export_of(folder: Path) -> Path:
    """Where checkpoint.also_save_hf writes what belongs to the checkpoint run.dir/checkpoints/iter_N."""
    return folder.parent.parent / "hf" / folder.name


# --- what may go -----------------------------------------------------------------------------------------------------


def sweep(root: Path) -> None:
    """Remove what dead runs have left half written or half deleted."""
    for folder in root.glob("iter_*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint to FOLDER.aside, so that nothing takes it for one and a person still can look. Returns the new path."""
    aside = folder.with_name(f"{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def retire(root: Path, step: int, keep_last: int, keep_every: int, spared: Collection[Path] = ()) -> list[Path]:
    """Delete the checkpoints before `step`, whose own is whole, but for the newest keep_last (that one counted; 0 keeps all), those of
    every keep_every-th step (0: none) and `spared` ones. Returns what is gone."""
    if not keep_last:
        return []
    older = [folder for folder in candidates(root) if step_of(folder) < step]
    spared = {path.resolve() for path in spared}
    gone = [folder for folder in older[keep_last - 1:] if not (keep_every and step_of(folder) % keep_every == 0) and folder.resolve() not in spared]
    for folder in gone:
        temporary = folder.with_suffix(".tmp")  # so that a half deleted folder is never taken for a checkpoint
        os.replace(folder, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    return gone
