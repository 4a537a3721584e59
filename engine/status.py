"""Where runs are, read from their folders alone: one line each, and the end of a rank's log.

    rows = [row for path in paths for row in rows_of(path)]
    print(table(rows))
    follow(rank_log(path, 0), print)

A run folder is that of engine/log.py. Nothing is asked of the ranks, so this works from any machine that sees the folder, and for runs that are
over. Where Slurm's squeue is there it says what has become of the job. Left out: plots (tb/) and anything older than the last line.
"""

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from yaml import safe_load

TAIL_BYTES = 1 << 16
COLUMNS = ("run", "state", "step", "loss", "tokens/s", "age", "job", "restarts")


def rows_of(path: Path) -> list[dict]:
    """One row of a run, or one for each rung of a ladder. Raises ValueError where `path` holds no run."""
    folders = [path] if (path / "status.json").is_file() else sorted(child.parent for child in path.glob("*/status.json"))
    if not folders:
        raise ValueError(f"{path} is no run folder: it has no status.json, which a run writes as soon as its ranks have met")
    return [row(folder) for folder in folders]


def row(folder: Path, now: float | None = None) -> dict:
    """What is known of one run. age: seconds since its last line; job, queue: Slurm's id and state of the job, if any."""
    status = _json(folder / "status.json")
    record = last_record(folder / "metrics.jsonl")
    slurm = _json(folder / "env.json").get("slurm") or {}
    written = [(folder / name).stat().st_mtime for name in ("metrics.jsonl", "status.json") if (folder / name).is_file()]
    return {
        "run": str(folder),
        "state": status.get("state", "unknown"),
        "reason": status.get("reason", ""),
        "step": record.get("step", status.get("step", 0)),
        "steps": _num_steps(folder / "config.yaml"),
        "loss": record.get("loss"),
        "tokens_per_s": record.get("tokens_per_s"),
        "age": (time.time() if now is None else now) - max(written),
        "job": slurm.get("job"),
        "queue": _queue_state(slurm["job"]) if slurm else None,
        "restarts": _restarts(folder, slurm),
    }


def table(rows: list[dict]) -> str:
    """Text for people; columns as wide as they must be."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"{row['run']}: {row['reason']}" for row in rows if row["reason"])])


def last_record(path: Path) -> dict:
    """The last whole training line of metrics.jsonl, of its last 64 KiB; empty where there is none."""
    return next((record for record in reversed(_last_records(path)) if "split" not in record), {})


def rank_log(folder: Path, rank: int) -> Path:
    """Raises ValueError where that rank has no log."""
    path = folder / "logs" / f"rank_{rank:05d}.log"
    if not path.is_file():
        logs = sorted((folder / "logs").glob("rank_*.log"))
        raise ValueError(f"there is no {path}" + (f"; this run has the logs of ranks 0 to {len(logs) - 1}" if logs else ""))
    return path


def follow(path: Path, show: Callable[[str], None], num_lines: int = 20, pause: float = 0.5) -> None:
    """Show the last lines of a log and then every new one, for ever; a log that is begun anew is shown from its start."""
    position, rest = path.stat().st_size, ""
    for line in _last_lines(path, position)[-num_lines:]:
        show(line)
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size < position:
            position, rest = 0, ""
        if size == position:
            time.sleep(pause)
            continue
        with open(path, errors="replace") as file:
            file.seek(position)
            *whole, rest = (rest + file.read()).split("\n")
            position = file.tell()
        for line in whole:
            show(line)


def _cells(row: dict) -> tuple[str, ...]:
    job = "" if row["job"] is None else f"{row['job']} {row['queue'] or ''}".rstrip()
    return (
        row["run"],
        row["state"],
        f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"]),
        "" if row["loss"] is None else f"{row['loss']:.4f}",
        "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
        str(datetime.timedelta(seconds=round(row["age"]))),
        job,
        "" if row["restarts"] is None else str(row["restarts"]),
    )


def _num_steps(path: Path) -> int | None:
    try:
        return safe_load(path.read_text())["train"]["steps"]
    except OSError:
        return None


def _restarts(folder: Path, slurm: dict) -> int | None:
    """How often the job, its chain of jobs, or the supervisor has started the ranks again; None where nobody counts."""
    begins = [line for line in _last_records(folder / "slurm" / "attempts.jsonl") if line["event"] == "begin"]
    if slurm and begins:
        return sum(line["series"] == begins[-1]["series"] for line in begins) - 1
    launches = [line for line in _last_records(folder / "logs" / "supervisor.jsonl") if line["event"] == "launch"]
    return slurm.get("restarts", launches[-1]["launch"] - 1 if launches else None)


def _queue_state(job: str) -> str | None:
    if not shutil.which("squeue"):
        return None
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None      # Slurm has forgotten a job that ended minutes ago


def _last_records(path: Path) -> list[dict]:
    found = []
    for line in _last_lines(path):
        with contextlib.suppress(ValueError):       # being written, or cut off at the front
            found.append(json.loads(line))
    return found


def _last_lines(path: Path, size: int | None = None) -> list[str]:
    """Of the last 64 KiB of a file, or of its first `size` bytes."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        return file.read(size - start).decode(errors="replace").splitlines()


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
