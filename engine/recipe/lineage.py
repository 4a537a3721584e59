"""Where a checkpoint comes from: lineage.json beside it, so that it can be read long after the recipe is gone.

    checkpoints/lineage.json: recipe, stage, identity, config (every field), parents (each with its own lineage), data (files with sizes and
    hashes), git_commit, packages, position, seconds, numbers, boundary, gates

Files are hashed whole up to 1 GiB; of larger ones the first and the last 64 MiB count, and `sha256_of` says so.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from engine.foreign import written_config
from engine.recipe.plan import Step
from engine.run_folder import find

NAME = "lineage.json"
WHOLE_BYTES, PART_BYTES = 2**30, 2**26


def path_of(folder: str | Path) -> Path | None:
    """Where the lineage of the checkpoint that `folder` means lies (see engine.run_folder.find); None without a checkpoint."""
    found = find(folder)
    return found.parent / NAME if found else None


def of_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The lineage of a checkpoint, or only where it is, when it was not made by a recipe."""
    path = path_of(folder)
    if path is None or not path.is_file():
        return {"checkpoint": str(folder)}
    return json.loads(path.read_text())


def describe(step: Step, recipe: Path, entry: dict[str, Any], sources: dict[str, Path]) -> dict[str, Any]:
    """The lineage of what a finished stage left. entry: what state.json holds of it; sources: folders by load and role names."""
    folder = find(step.result)
    environment = json.loads((step.result / "env.json").read_text()) if (step.result / "env.json").is_file() else {}
    external = {} if "load" in sources or not step.run.checkpoint.load else {"load": Path(step.run.checkpoint.load)}
    return {
        "recipe": str(recipe), "stage": step.name, "kind": step.kind, "identity": entry["identity"], "checkpoint": str(folder),
        "position": entry["position"], "seconds": entry["seconds"], "ranks": step.ranks,
        "git_commit": environment.get("git_commit"), "packages": environment.get("packages", {}),
        "config": written_config(folder) if (folder / "config.yaml").is_file() else step.run.model_dump(),
        "data": data_files(step),
        "numbers": entry["numbers"], "boundary": entry["boundary"], "gates": entry.get("verdicts", []),
        "parents": {role: of_checkpoint(path) for role, path in {**sources, **external}.items()},
    }


def data_files(step: Step) -> list[dict[str, Any]]:
    """Every file of the stage's training and validation data that is there: path, bytes, sha256, sha256_of."""
    names = {}
    for run in step.runs:
        data = run.data
        lists = [data.train, data.replay, *data.valid.values(), *(phase.train for phase in data.phases)]
        names |= dict.fromkeys(name for entries in lists for name in entries)
        names |= dict.fromkeys([data.tokenizer.partition(":")[2]])
    candidates = [Path(name + suffix) for name in names if name for suffix in ("", ".bin", ".idx", "/tokenizer.json")]      # weights are no files
    return [_file(path) for path in candidates if path.is_file()]


def _file(path: Path) -> dict[str, Any]:
    size, digest = path.stat().st_size, hashlib.sha256()
    spans = [(0, size)] if size <= WHOLE_BYTES else [(0, PART_BYTES), (size - PART_BYTES, size)]
    with open(path, "rb") as file:
        for start, stop in spans:
            file.seek(start)
            while file.tell() < stop:
                digest.update(file.read(min(2**20, stop - file.tell())))
    what = "whole" if len(spans) == 1 else f"first and last {PART_BYTES} bytes"
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest(), "sha256_of": what}


def write_json(path: Path, value: Any) -> None:
    """Readers see the old file or the new one, never a part, whenever this process ends."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
