"""Stands for launch/pretrain.py in tests of the supervisor: a rank that takes steps, saves, hears signals, and meets the faults it is told of.

    python tests/rank_stub.py CONFIG.yaml run.dir=DIR [fault=LAUNCH:RANK:STEP:KIND ...]

KIND: kill, hang (hears signals and does nothing), unready (dies of signals, as a rank that still imports does), stop (SIGSTOP), child (leaves a
process), wait (goes on when told to save), shout (writes a megabyte and then waits), or an exit code. Rank 0 writes metrics.jsonl and saves every
5 steps into DIR/saved; a launch goes on from there. No torch, so a launch takes a tenth of a second.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REQUEUE = 75


def main() -> int:
    options = [word.partition("=")[::2] for word in sys.argv[1:] if "=" in word]
    folder, steps = Path(dict(options)["run.dir"]), int(dict(options).get("steps", 20))
    rank, launch = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    faults = {int(step): kind for name, value in options if name == "fault"
              for at, of, step, kind in [value.split(":")] if (int(at), int(of)) == (launch, rank)}
    heard = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: heard.append(number))
    saved = folder / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} goes on from {step}", flush=True)
    print(f"rank {rank} on stderr", file=sys.stderr, flush=True)
    while step < steps:
        step += 1
        if step in faults:
            meet(faults[step], heard)
        time.sleep(float(dict(options).get("seconds", 0.01)))
        if rank == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step}) + "\n")
        if rank == 0 and (heard or step % 5 == 0):
            saved.with_suffix(".part").write_text(str(step))
            saved.with_suffix(".part").rename(saved)
        if heard:
            return REQUEUE
    return 0


def meet(kind: str, heard: list[int]) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "child":
        subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    elif kind.isdecimal():
        sys.exit(int(kind))
    else:
        if kind == "unready":
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
        if kind == "shout":
            print(("x" * 99 + "\n") * 10_000, file=sys.stderr)
        print("waits", flush=True)
        while not (heard and kind in ("wait", "shout")):
            signal.pause()


if __name__ == "__main__":
    sys.exit(main())
