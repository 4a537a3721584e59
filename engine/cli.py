"""What the training commands of launch/ share: read the arguments, validate, train, and turn a person's mistake into one clear message.

Exit codes of a training command: 0 done (or stopped by RUN/STOP), 1 error, 2 usage or configuration, 75 saved and to be started again.
Left out of the fast path: torch and megatron are imported only when the configuration is sound, so `--help` and every
configuration error answer in under a second.
"""

import argparse
import hashlib
import os
import sys
import tempfile

import psutil

from engine.signals import Signals
from engine.slurm import tasks
from engine.stages import ALIGN, STAGES

OK, ERROR, USAGE = 0, 1, 2
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a checkpoint is saved, and whoever started this should start it again
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo's words, and NCCL's


def main(doc: str, stages) -> int:
    """Run a training command on this rank. Returns the exit code. stages: those of engine.stages that it runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()

    with Signals() as signals:

        def train(run):
            from engine.train import train

            return REQUEUE if train(run, signals) == "requeue" else OK

        return guarded(args.config, args.overrides, train, stages)


def guarded(config: str, overrides: list[str], act, stages=STAGES, instead: dict | None = None) -> int:
    """act(run) for the RunConfig of a file and overrides (see load_config). Returns the exit code, which is act's where it returns one;
    mistakes are told, not raised."""
    from engine.config import ConfigError, load_config

    try:
        tasks.adopt()
    except ValueError as error:
        return say(f"error: {error}", ERROR)
    try:
        run = load_config(config, overrides, world_size=int(os.environ.get("WORLD_SIZE", 1)), instead=instead)
    except ConfigError as error:
        return say(f"{config}: {len(error.problems)} mistake{'s' * (len(error.problems) > 1)} in the configuration\n{error}", USAGE)
    if run.stage in STAGES and run.stage not in stages:
        command = "launch/align.py" if run.stage in ALIGN else "launch/pretrain.py"
        return say(f"stage={run.stage} is run by {command}; this command runs {', '.join(stages)}", USAGE)
    return _acted(act, run)


def _acted(act, run) -> int:
    from engine import environment
    from engine.config import ConfigError

    if run.run.device != "cpu":
        environment.apply(run)  # before the seam is imported, which looks for a GPU and so starts CUDA
    from engine.mcore import topology

    try:
        code = act(run) or OK
    except ConfigError as error:  # what only a checkpoint or a tokenizer could tell
        return say(f"error:\n{error}", USAGE)
    except (ValueError, OSError) as error:  # what a person must mend; anything else is ours and keeps its traceback
        return say(f"error: {error}", ERROR)
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PEER):
            raise
        return say("error: another rank has ended, so this one cannot go on; that rank's own message says why", ERROR)
    except KeyboardInterrupt:
        return say("interrupted", ERROR)
    topology.stop()
    return code


def say(message: str, code: int) -> int:
    """Print without a traceback, once per machine: ranks that fail alike say so once, and whichever is first says it, because
    torchrun ends the others as soon as one has left."""
    if "RANK" not in os.environ or _is_first_to_say(message):
        print(message, file=sys.stderr, flush=True)
        if code == USAGE and (path := os.environ.get("TRIREME_REFUSAL")):  # a Slurm job is not started again for it (engine/slurm/attempts.py)
            with open(path, "a") as file:
                file.write(f"{message}\n")
    return code


def _is_first_to_say(message: str) -> bool:
    # The parent is torchrun's agent or a supervisor; its process id and time of birth, which differ also where ids come again, and its count of
    # restarts name this start of this job.
    born, restart = psutil.Process(os.getppid()).create_time(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    said = f"trireme-{os.getppid()}-{born:.2f}-{restart}-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        os.close(os.open(os.path.join(tempfile.gettempdir(), said), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
