"""Check the nodes of a job: srun launch/slurm/check_node.py CONFIG.yaml [key=value ...]

Started like the ranks, one task each, before them (launch/slurm/job.py puts it into the job script). Looks at the GPUs and their memory, the
host's memory, /dev/shm and the disk of run.dir on every node, then at all nodes together: who answers, how far the clocks are apart, and whether
a sum over all ranks comes out right (gloo, and NCCL on GPUs). What is asked for: section slurm.check. Rank 0 names the nodes that fail and
writes them into run.dir/slurm/nodes.json, so that a requeue avoids them; ranks that do not reach rank 0 speak for themselves.
Exit codes: 0 every node is sound, 1 one is not, 2 usage or configuration. Without Slurm it checks this machine alone.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()

    from engine.cli import USAGE, say
    from engine.config import ConfigError, load_config
    from engine.slurm.nodes import problems
    from engine.slurm.tasks import adopt

    adopt()
    try:
        run = load_config(args.config, args.overrides, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        return say(f"{args.config}: {len(error.problems)} mistake{'s' * (len(error.problems) > 1)} in the configuration\n{error}", USAGE)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = problems(run) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    bad = together(found, run, node) if "RANK" in os.environ else {node: found} if found else {}
    if int(os.environ.get("RANK", 0)) == 0:
        tell(bad, run)
    return 1 if bad else 0


def together(found: list[str], run, node: str) -> dict[str, list[str]]:
    from engine.slurm.collective import Unreachable, compare
    from engine.slurm.tasks import is_task, nodes_of_ranks

    nodes = nodes_of_ranks() if is_task() else [f"the node of rank {rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
    try:
        return compare(found, run, node, nodes)
    except Unreachable as error:
        print(f"check of the nodes: {node}: {error}", file=sys.stderr, flush=True)
        return {node: [str(error)]}


def tell(bad: dict[str, list[str]], run) -> None:
    """On rank 0: what was found, for people and for attempt.py."""
    nodes = run.slurm.nodes
    for node, problems in bad.items():
        for problem in problems:
            print(f"check of the nodes: {node}: {problem}", flush=True)
    if not bad:
        print(f"check of the nodes: {nodes} node{'s' * (nodes > 1)} sound", flush=True)
    path = Path(run.run.dir) / "slurm" / "nodes.json"
    with contextlib.suppress(OSError):      # the disk may be what is wrong, and that has been said
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"num_nodes": nodes, "bad": bad}))


if __name__ == "__main__":
    sys.exit(main())
