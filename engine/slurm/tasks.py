"""Which rank a task of srun is: torchrun's environment variables from Slurm's.

    adopt()                 # early, in every rank; does nothing unless srun has started this process as one of several tasks

srun starts one task per rank and nothing lies between, so RANK and its kin come from SLURM_PROCID and its kin, the address from the first
node of the step, and the port from the job. Left alone are a process that has a RANK already (torchrun, launch/supervise.py), the batch script
itself, and the shell of salloc, all of which see some of Slurm's variables too.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import MutableMapping

FIRST_OWN_STEP = 0xFFFFFFF0         # from here on step ids mean the batch script, the shell of salloc, or what the prolog left running
FIRST_PORT, NUM_PORTS = 20_000, 12_000      # below Linux's first ephemeral port (32768), which any outgoing connection may hold


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what torchrun would set, where it is not set. Raises ValueError when Slurm's variables cannot be read."""
    if "RANK" in environ or not is_task(environ):
        return
    nodes, tasks = expand(environ["SLURM_STEP_NODELIST"]), tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    for name, value in {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(environ["SLURM_NODEID"])],
        "GROUP_RANK": environ["SLURM_NODEID"],
        "MASTER_PORT": port(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])),
        "OMP_NUM_THREADS": 1,  # as torchrun does; the number of threads changes the last digits of sums
    }.items():
        environ.setdefault(name, str(value))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = address(nodes[0])


def is_task(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether srun has started this process as one of several tasks. A batch script has no step, the shell of salloc a step of its own kind."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_OWN_STEP and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def nodes_of_ranks(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """The node of each task of this step, by rank, as srun places them when nobody says otherwise (in blocks)."""
    nodes, tasks = expand(environ["SLURM_STEP_NODELIST"]), tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return [node for node, num in zip(nodes, tasks, strict=True) for _ in range(num)]


def described(environ: MutableMapping[str, str] = os.environ) -> dict | None:
    """What env.json keeps of the job: its id, how often Slurm has started it again, its nodes; None outside Slurm."""
    if "SLURM_JOB_ID" not in environ:
        return None
    return {"job": environ["SLURM_JOB_ID"], "restarts": int(environ.get("SLURM_RESTART_COUNT", 0)), "nodes": environ.get("SLURM_JOB_NODELIST", "")}


def port(job: int, step: int) -> int:
    """The same on every rank, another for the next step (the check of the nodes is the one before), the same after a requeue."""
    return FIRST_PORT + (8 * job + step) % NUM_PORTS


def address(node: str) -> str:
    """Where a node is reached: its name, or what Slurm knows as its address where names are no host names."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "node", "-o", node], capture_output=True, text=True)
        if found := re.search(r"\bNodeAddr=(\S+)", done.stdout):
            return found[1]
    raise ValueError(f"the first node of this job, {node}, is no host name that can be looked up, and scontrol knows no address of it; "
                     "set MASTER_ADDR (slurm.env.MASTER_ADDR)")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]. Raises ValueError."""
    found = []
    for part in text.split(","):
        parsed = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not parsed:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read at {part!r}")
        found += [int(parsed[1])] * int(parsed[2] or 1)
    return found


def expand(nodes: str) -> list[str]:
    """Slurm's `gpu[001-003,7]-ib,login` as [gpu001-ib, gpu002-ib, gpu003-ib, gpu7-ib, login]. Raises ValueError."""
    return [name for part in _at_commas(nodes) for name in _expand_one(part, nodes)]


def _at_commas(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    if text.count("[") != text.count("]"):
        raise ValueError(f"the list of nodes {text!r} has an open bracket")
    return re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)


def _expand_one(part: str, whole: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, after = rest.partition("]")
    numbers = []
    for span in inside.split(","):
        first, dash, last = span.partition("-")
        if not (first.isdigit() and (not dash or last.isdigit() and int(first) <= int(last))):
            raise ValueError(f"the list of nodes {whole!r} cannot be read at {span!r}")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in _expand_one(after, whole)]
