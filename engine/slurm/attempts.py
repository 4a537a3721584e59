"""What a job does before its ranks start and after they have ended: run.dir/slurm/attempts.jsonl, and the decision to start again.

    code = begin(run_dir, max_restarts)                 # 0: start the ranks; 3: nothing is left to do; 1: give up
    code = end(run_dir, outcome, limits)                # the job's exit code, unless a requeue ends the job first

Attempts of one job, or of one chain or array of jobs, are a series. Progress is a newer checkpoint; restarts without any are counted.
The ranks' exit code alone does not tell how they ended: srun ends the tasks that are a little later than the first to leave with anything
but 0, and then reports 143 for a run that has saved and asked for a requeue. So status.json, which rank 0 writes, counts more.
A batch script runs this with the host's Python: standard library only, 3.9 or newer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

START, GIVE_UP, NOTHING_LEFT = 0, 1, 3      # exit codes of begin
USAGE, REQUEUE = 2, 75                      # of the ranks, engine/cli.py
ENDINGS = {"done": 0, "stopped": 0, "refused": USAGE, "cancelled": 1, "gave up": 1}     # verdicts that end a series, and the job's exit codes


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. checked: exit code of the check of the nodes; code: srun's of the ranks; state, reason: of status.json where this
    attempt wrote it; refusal: what a rank was asked for and cannot do; stop_file: RUN/STOP is there; job_state: Slurm's words."""

    checked: int = 0
    code: int = 0
    state: str = ""
    reason: str = ""
    refusal: str = ""
    stop_file: bool = False
    job_state: str = "RUNNING"
    without_progress: int = 0       # restarts in a row without a newer checkpoint, if this attempt is followed by another
    restarts: int = 0               # how often Slurm has started this job again


@dataclass(frozen=True)
class Limits:
    """then: what follows an attempt that can be gone on with: requeue, next (a job of the series) or nothing."""

    max_restarts: int
    max_requeues: int
    then: str = "requeue"


def decide(outcome: Outcome, limits: Limits) -> tuple[str, str]:
    """(verdict, why). verdict: one of ENDINGS; requeue; or next: another job goes on."""
    what = _what_happened(outcome)
    if outcome.job_state not in ("RUNNING", "COMPLETING TimeLimit"):
        return "cancelled", f"{what}; Slurm is ending this job ({outcome.job_state})"
    if outcome.state == "stopped" or outcome.stop_file:
        return "stopped", "the file STOP was there"
    if outcome.refusal:
        return "refused", outcome.refusal
    if outcome.checked == outcome.code == 0:
        return "done", what
    if USAGE in (outcome.checked, outcome.code):
        return "refused", what
    if outcome.without_progress > limits.max_restarts:
        return "gave up", f"{what}; no newer checkpoint after {limits.max_restarts} restarts (slurm.max_restarts)"
    if limits.then == "nothing":
        return "next" if outcome.state == "requeue" else "gave up", f"{what}; slurm.requeue is false"
    if limits.then == "requeue" and outcome.restarts >= limits.max_requeues:
        return "gave up", f"{what}; this job was requeued {outcome.restarts} times (slurm.max_requeues)"
    return limits.then, what


def _what_happened(outcome: Outcome) -> str:
    if outcome.checked:
        return f"the check of the nodes ended with code {outcome.checked}"
    if outcome.state == "requeue":
        return f"saved and asked for a requeue ({outcome.reason})"
    return "done" if outcome.code == 0 else f"the ranks ended with code {outcome.code}" + (f" ({outcome.reason[:120]})" if outcome.state == "failed" else "")


def restarts_without_progress(starts: list[int], now: int) -> int:
    """How many restarts in a row would have brought nothing with one more. starts: progress at the begin of every attempt so far; now: the latest."""
    count = 0
    for start in reversed(starts):
        if start < now:
            break
        count += 1
    return count


def progress(run_dir: Path) -> int:
    """The step of the newest checkpoint; summed over the rungs of a ladder, which have folders of their own."""
    return sum(_newest(root) for root in (run_dir / "checkpoints", *run_dir.glob("*/checkpoints")))


def _newest(root: Path) -> int:
    """0 where there is none. Whether its bytes are whole is for the ranks to find out."""
    names = (re.fullmatch(r"iter_(\d+)", path.parent.name) for path in root.glob("iter_*/metadata.json"))
    return max((int(name[1]) for name in names if name), default=0)


# --- the two moments --------------------------------------------------------------------------------------------------------


def begin(run_dir: Path, max_restarts: int, say=print) -> int:
    """Note that an attempt starts. Returns START, NOTHING_LEFT or GIVE_UP."""
    for name in ("slurm", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    me = _me()
    earlier = _of_series(_read(run_dir), me)
    now = progress(run_dir)
    verdict = earlier[-1]["verdict"] if earlier and earlier[-1]["event"] == "end" else ""
    if verdict in ENDINGS:
        say(f"{_title(me)}: nothing to do, since an earlier job of this series ended: {verdict} ({earlier[-1]['reason']})")
        return NOTHING_LEFT if ENDINGS[verdict] == 0 else GIVE_UP
    if earlier and (run_dir / "STOP").exists():
        say(f"{_title(me)}: not started again, since {run_dir / 'STOP'} is there")
        _append(run_dir, {"event": "end", **me, "progress": now, "verdict": "stopped", "reason": "the file STOP was there"})
        return NOTHING_LEFT
    starts = [line["progress"] for line in earlier if line["event"] == "begin"]
    count = restarts_without_progress(starts, now)
    if count > max_restarts:        # Slurm itself requeues a job whose node has died, without asking `end`
        reason = f"no newer checkpoint after {max_restarts} restarts (slurm.max_restarts)"
        say(f"{_title(me)}: given up; {reason}")
        _append(run_dir, {"event": "end", **me, "progress": now, "verdict": "gave up", "reason": reason})
        return GIVE_UP
    for name in ("refusal", "nodes.json"):
        with contextlib.suppress(FileNotFoundError):
            (run_dir / "slurm" / name).unlink()
    _append(run_dir, {"event": "begin", **me, "progress": now, "nodes": os.environ.get("SLURM_JOB_NODELIST", ""), "status": _stamp(run_dir)})
    say(f"{_title(me)} on {os.environ.get('SLURM_JOB_NODELIST', 'this machine')}: attempt {len(starts) + 1}, newest checkpoint at step {now}")
    return START


def end(run_dir: Path, checked: int, code: int, limits: Limits, say=print) -> int:
    """Decide, write it down, and do it. Returns the job's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # a requeue ends this job, but not before its nodes are excluded
    me = _me()
    earlier = _of_series(_read(run_dir), me)
    starts = [line for line in earlier if line["event"] == "begin"]
    now, job = progress(run_dir), _scontrol("show", "job", "-o", me["job"])
    state, reason = _status(run_dir, starts[-1]["status"] if starts else "")
    outcome = Outcome(checked, code, state, reason, _text(run_dir / "slurm" / "refusal").strip(), (run_dir / "STOP").exists(), _job_state(job),
                      restarts_without_progress([line["progress"] for line in starts], now), me["restart"])
    verdict, why = decide(outcome, limits)
    _append(run_dir, {"event": "end", **me, "progress": now, "checked": checked, "code": code, "state": state, "verdict": verdict, "reason": why})
    say(f"{_title(me)}: {verdict}; {why}")
    if verdict == "requeue" and not _requeue(me["job"], job, _bad_nodes(run_dir, say), say):
        return GIVE_UP
    return ENDINGS.get(verdict, REQUEUE)


def _requeue(job: str, described: str, bad_nodes: list[str], say) -> bool:
    """Put this job back into the queue, away from bad nodes. What a job excludes can be changed only while it waits, which it does from the
    requeue on; Slurm leaves this process a few seconds."""
    before = re.search(r"\bExcNodeList=(\S+)", described)
    excluded = [before[1]] if before and before[1] != "(null)" else []
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        say(f"scontrol requeue {job}: {done.stderr.strip()}; this cluster may forbid it: submit with launch/slurm/job.py --chain N")
        return False
    if bad_nodes:
        done = subprocess.run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded + bad_nodes)}"], capture_output=True, text=True)
        say(f"excluded {', '.join(bad_nodes)}" if not done.returncode else f"could not exclude {', '.join(bad_nodes)}: {done.stderr.strip()}")
    return True


def _bad_nodes(run_dir: Path, say) -> list[str]:
    """Those that the check of the nodes has named, where they are a minority; else something is wrong that other nodes would share."""
    text = _text(run_dir / "slurm" / "nodes.json")
    if not text:
        return []
    found = json.loads(text)
    bad = sorted(found["bad"])
    if 2 * len(bad) > found["num_nodes"]:
        say(f"{len(bad)} of {found['num_nodes']} nodes failed their check, so none is excluded")
        return []
    return bad


# --- what is read -----------------------------------------------------------------------------------------------------------


def _me() -> dict:
    job = os.environ.get("SLURM_JOB_ID", "0")
    series = os.environ.get("TRIREME_SERIES") or os.environ.get("SLURM_ARRAY_JOB_ID") or job
    return {"series": series, "job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)), "time": round(time.time(), 3)}


def _title(me: dict) -> str:
    return f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] job {me['job']}" + (f", restart {me['restart']}" if me["restart"] else "")


def _of_series(lines: list[dict], me: dict) -> list[dict]:
    """Attempts that count for this one. An ending of this very job does not: somebody has requeued it by hand, and so starts afresh."""
    found = [line for line in lines if line["series"] == me["series"]]
    for i in reversed(range(len(found))):
        if found[i]["event"] == "end" and found[i]["job"] == me["job"] and found[i]["verdict"] in ENDINGS:
            return found[i + 1:]
    return found


def _read(run_dir: Path) -> list[dict]:
    found = []
    for line in _text(run_dir / "slurm" / "attempts.jsonl").splitlines():
        with contextlib.suppress(ValueError):       # one that a crash cut off
            found.append(json.loads(line))
    return found


def _append(run_dir: Path, line: dict) -> None:
    with open(run_dir / "slurm" / "attempts.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _status_file(run_dir: Path) -> Path | None:
    """The newest status.json of a run or of the rungs of a ladder."""
    found = [path for path in (run_dir / "status.json", *run_dir.glob("*/status.json")) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _stamp(run_dir: Path) -> str:
    path = _status_file(run_dir)
    return f"{path} {path.stat().st_mtime_ns}" if path else ""


def _status(run_dir: Path, before: str) -> tuple[str, str]:
    """(state, reason) of status.json; empty where it is as it was before this attempt."""
    if _stamp(run_dir) == before:
        return "", ""
    try:
        status = json.loads(_status_file(run_dir).read_text())
        return status["state"], status.get("reason", "")
    except (ValueError, KeyError):
        return "", ""


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


def _job_state(described: str) -> str:
    """RUNNING, or for a job that is being ended COMPLETING with Slurm's reason, such as TimeLimit. RUNNING too where Slurm does not answer."""
    state, reason = re.search(r"\bJobState=(\S+)", described), re.search(r"\bReason=(\S+)", described)
    if not state or state[1] == "RUNNING":
        return "RUNNING"
    return f"{state[1]} {reason[1]}" if reason and reason[1] != "None" else state[1]
