"""Plan: python launch/plan.py CONFIG.yaml [--gpus N] [--gpu h100] [key=value ...]

Says, before anything is started and without a GPU, which layouts of a configuration are legal and fit on so many GPUs, how fast each is likely to be,
and why the others were refused. --write puts the best layout into a configuration. Overrides fix parts of the layout: parallel.tp=4,
train.micro_batch=1, train.recompute=none. What the figures rest on, and how far they were checked: docs/planner.md.
Exit codes: 0 a layout fits, 1 none does, 2 usage or configuration.
"""

import argparse
import json
import signal
import sys

ERROR, USAGE = 1, 2
SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def arguments() -> argparse.Namespace:
    from engine.planner.cluster import GPUS, NETWORKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs altogether (default 8)")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help=f"their kind (default h100): {', '.join(GPUS)}")
    parser.add_argument("--nodes", type=int, default=0, metavar="N", help="machines (racks of GB200) they are in; default: of the usual size")
    parser.add_argument("--network", default="", metavar="NAME", help=f"between machines: {', '.join(NETWORKS)}, or GB/s per GPU")
    parser.add_argument("--gpu-memory", type=float, default=0, metavar="GIB", help="memory of a GPU, if not the usual (A100 of 40 GB: 39.4)")
    parser.add_argument("--fp8", action="store_true", help="try FP8 matrix products too, where the GPU has them")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to list (default 10)")
    parser.add_argument("--tokens", type=_tokens, default=0, metavar="N", help="tokens of the whole run: 15T, 300B, 15e12; default: train.steps")
    parser.add_argument("--price", type=float, default=0, metavar="X", help="of one GPU for an hour")
    parser.add_argument("--law", default="", metavar="law.json", help="a scaling law of your own (launch/recipe.py fit) for the best sizes")
    parser.add_argument("--write", default="", metavar="OUT.yaml", help="write the configuration with a layout of the list")
    parser.add_argument("--choose", type=int, default=1, metavar="ROW", help="row that is told in full and that --write takes (default 1)")
    parser.add_argument("--json", action="store_true", help="print what a program can read")
    return parser.parse_intermixed_args()


def _tokens(text: str) -> float:
    number, times = (text[:-1], SUFFIXES[text[-1].upper()]) if text[-1:].upper() in SUFFIXES else (text, 1)
    try:
        return float(number) * times
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; say 15e12 or 15T (K, M, B, T: thousands to trillions)") from None


def main() -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)      # what reads it (head) may have enough
    args = arguments()
    from engine.config import ConfigError

    try:
        return plan(args)
    except ConfigError as error:
        print(f"{args.config}: {len(error.problems)} mistake{'s' * (len(error.problems) > 1)}\n{error}", file=sys.stderr)
        return USAGE
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR


def plan(args) -> int:
    from engine.config import ConfigError
    from engine.planner.cluster import make_cluster
    from engine.planner.help import what_would_help
    from engine.planner.report import Options, as_dict, report
    from engine.planner.search import merged, own_layout, read, search, with_fp8, write

    for name, value, least in (("--top", args.top, 1), ("--choose", args.choose, 1), ("--tokens", args.tokens, 0), ("--price", args.price, 0)):
        if not least <= value < float("inf"):
            raise ConfigError([f"{name} {value:g} must be {least} or more"])
    cluster = make_cluster(args.gpu, args.gpus, args.nodes, args.network, args.gpu_memory)
    base, raw, pins = read(args.config, args.overrides)
    options = Options(args.top, args.tokens, args.price, _law(args.law), args.choose)
    answer = search(base, cluster, pins)
    if args.fp8:
        answer = merged(answer, search(with_fp8(base, cluster), cluster, pins))
    num_rows = min(args.top, len(answer.plans))
    if answer.plans and args.choose > num_rows:
        further = f", or list more with --top {args.choose}" if args.choose <= len(answer.plans) else ""
        raise ConfigError([f"--choose {args.choose} is no row of the list, which has {num_rows}; choose 1 to {num_rows}{further}"])
    if args.write and answer.plans:
        write(raw, answer.plans[args.choose - 1], args.write)
        print(f"wrote layout {args.choose} into {args.write}", file=sys.stderr)
    if args.json:
        print(json.dumps(as_dict(answer, base, cluster, options), indent=1))
    else:
        print(report(answer, base, cluster, own_layout(raw, cluster), options))
    if not answer.plans:
        print("\n" + what_would_help(answer, base, cluster, pins), file=sys.stderr if args.json else sys.stdout)
        return ERROR
    return 0


def _law(path: str):
    if not path:
        return None
    from engine.config import ConfigError
    from engine.recipe import scaling

    law = scaling.read(path)
    if law.kind != "surface":
        raise ConfigError([f"--law {path} knows compute alone, not how to share it between parameters and tokens; leave it out"])
    return law


if __name__ == "__main__":
    sys.exit(main())
