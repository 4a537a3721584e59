"""Going back to a checkpoint after a loss spike, and on with the data behind it: RUN/rollbacks.json remembers each time.

    entry = Entry(...); record(folder, entry)        # rank 0, before anything else is done
    set_aside_newer(folder, entry.to_step)
    entry = unknown_to(read(folder), known)          # where a run starts: has it gone back since the checkpoint that it finds was written?

The file is written first, so a run that is killed anywhere after that goes back when it starts again. A checkpoint says how many entries it
knows of (stage.json, "faults"); one that it does not know of is still to be followed. What lies after to_step is renamed to iter_N.aside, for the
run goes through those steps once more. Left out: which step is a spike (engine/faults.py), and loading.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "rollbacks.json"
ROOTS = ("checkpoints", "average", "hf")  # where a run keeps a folder per step


@dataclass(frozen=True)
class Entry:
    """One time. The samples first_sample to next_sample - 1 were read after to_step and are in no step that counts."""

    at_step: int
    to_step: int
    first_sample: int
    next_sample: int
    why: str


def read(folder: str | Path) -> list[Entry]:
    path = Path(folder) / NAME
    return [Entry(**entry) for entry in json.loads(path.read_text())] if path.is_file() else []


def record(folder: str | Path, entry: Entry) -> None:
    path = Path(folder) / NAME
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        json.dump([asdict(one) for one in [*read(folder), entry]], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def unknown_to(entries: Sequence[Entry], known: int) -> Entry | None:
    """The last entry, where a checkpoint knows of fewer."""
    return entries[-1] if len(entries) > known else None


def newest(root: str | Path, at_most: int) -> Path | None:
    """The newest complete checkpoint of a step up to at_most."""
    steps = [step for folder in Path(root).glob("iter_*") if (step := _step(folder)) is not None and step <= at_most and (folder / "metadata.json").is_file()]
    return Path(root) / f"iter_{max(steps):07d}" if steps else None


def set_aside_newer(folder: str | Path, step: int) -> None:
    """Rename what the run keeps of steps after `step`; what was set aside before under the same name goes."""
    for root in ROOTS:
        for found in (Path(folder) / root).glob("iter_*"):
            if _step(found) is not None and _step(found) > step:
                aside = found.with_name(f"{found.name}.aside")
                shutil.rmtree(aside, ignore_errors=True)
                found.rename(aside)


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("iter_")
    return int(number) if number.isdigit() else None
