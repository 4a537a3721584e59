"""A bit flipped, a file cut short, a file gone: in every kind of file of a checkpoint, is it found and the file named?

In each case one file of the newer of two checkpoints is damaged. Found means: the check names the file, and a run goes on from the older checkpoint.
Left out: files that were added, which nobody reads.
"""

import random
import tempfile
from collections import Counter
from pathlib import Path

from _faults_kill_save import parts

CASES = 200
KINDS = ("flipped", "cut", "gone")


def run(cases: int, seed: int) -> int:
    from engine.mcore import saving, topology

    topology.start_single()
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            saving.save(Path(folder) / f"iter_{step:07d}", parts(step, num_numbers=500, also=("roles/critic",)))
        tried, missed = damaged(Path(folder), cases or CASES, random.Random(seed))
    for kind in KINDS:
        print(f"| {kind} | {sum(n for (what, _), n in tried.items() if what == kind)} cases in {len({name for what, name in tried if what == kind})} files "
              f"| {sum(what == kind for what, _ in missed)} not found |")
    return int(bool(missed))


def damaged(root: Path, cases: int, rng: random.Random) -> tuple[Counter, list]:
    """((kind, file) -> cases, those that were not found). root: of two checkpoints; afterwards it is as before."""
    from engine import run_folder

    newest, older = run_folder.candidates(root)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    tried, missed = Counter(), []
    for case in range(cases):
        path, kind = files[case % len(files)], KINDS[case // len(files) % len(KINDS)]
        whole, name = path.read_bytes(), path.relative_to(newest).as_posix()
        _damage(path, whole, kind, rng)
        tried[kind, name] += 1
        if not any(name in problem for problem in run_folder.problems(newest)) or run_folder.newest_verified(root) != older:
            missed.append((kind, name))
        path.write_bytes(whole)
    assert not run_folder.problems(newest)
    return tried, missed


def _damage(path: Path, whole: bytes, kind: str, rng: random.Random) -> None:
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(whole[:rng.randrange(len(whole))])
    else:
        bit = rng.randrange(8 * len(whole))
        path.write_bytes(whole[:bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1:])
