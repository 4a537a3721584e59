"""The command line of launch/supervise.py, read before anything else is imported, so that --help and mistakes answer at once."""

import argparse
from pathlib import Path


def options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Leaves the process with exit code 2 where they are wrong. address: (host, port) of --master, None for one machine."""
    parser = argparse.ArgumentParser(prog="supervise.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on this machine (1)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="M", help="machines, each with a supervisor of its own (1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="which of them this one is, from 0")
    parser.add_argument("--master", default="", metavar="HOST:PORT", help="where node 0 listens; needed with --nnodes")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="K", help="launches in a row without a new step that are started again (3)")
    parser.add_argument("--requeue-here", action="store_true", help="start again after exit code 75 too, where nobody else would")
    parser.add_argument("--output", choices=("first", "all"), default="first", help="whose stdout is shown; every rank's stderr is (first)")
    parser.add_argument("--grace-seconds", type=float, default=5, metavar="S", help="for the other ranks to leave when one has failed (5)")
    parser.add_argument("--stop-seconds", type=float, default=300, metavar="S", help="for the ranks to save and leave when they are told to (300)")
    parser.add_argument("--backoff-seconds", type=float, default=1, metavar="S", help="before a restart; doubled for each launch without progress (1)")
    parser.add_argument("--longest-backoff-seconds", type=float, default=300, metavar="S", help="where the doubling ends (300)")
    parser.add_argument("--join-seconds", type=float, default=600, metavar="S", help="how long to wait for the other machines (600)")
    parser.add_argument("program", metavar="PROGRAM", help="launch/pretrain.py or launch/align.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CONFIG.yaml [key=value ...]")
    args = parser.parse_args(argv)
    if args.nproc_per_node < 1 or args.nnodes < 1:
        parser.error(f"--nproc-per-node {args.nproc_per_node} and --nnodes {args.nnodes} must be at least 1")
    if not 0 <= args.node_rank < args.nnodes:
        parser.error(f"--node-rank {args.node_rank} is none of the {args.nnodes} nodes, which count from 0")
    args.address = _address(parser, args.master) if args.nnodes > 1 else None
    if not Path(args.program).is_file():
        parser.error(f"no program at {args.program}")
    return args


def _address(parser: argparse.ArgumentParser, master: str) -> tuple[str, int]:
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"--master {master or '(not given)'} is not HOST:PORT, which --nnodes needs")
    return host.strip("[]"), int(port)
