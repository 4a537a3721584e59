"""Slurm: python launch/slurm/job.py CONFIG.yaml [--submit | --output FILE] [--chain N | --array N] [key=value ...]

Makes the job script of a run from its configuration (section slurm: nodes, GPUs, time limit, account, container ...) and prints it, writes it,
or hands it to sbatch. Every key is described in engine/launch_sections.py and can be overridden, such as slurm.nodes=4 slurm.time_limit_hours=12;
a layout that the nodes cannot hold is refused. The job goes on by itself near its time limit and after faults (docs/launch.md); where a
cluster forbids that, --chain or --array submits N jobs, each of which goes on where the one before stopped.
Exit codes: 0 done, 1 sbatch refused, 2 usage or configuration.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--submit", action="store_true", help="keep the script as run.dir/slurm/job.sh and submit it")
    where.add_argument("--output", metavar="FILE", type=Path, help="write the script here")
    series = parser.add_mutually_exclusive_group()
    series.add_argument("--chain", type=int, default=0, metavar="N", help="submit N jobs, each after the one before (sbatch --dependency=afterany)")
    series.add_argument("--array", type=int, default=0, metavar="N", help="one job array of N tasks that run one at a time")
    args = parser.parse_intermixed_args(argv)
    if min(args.chain, args.array) < 0:
        parser.error("--chain and --array count jobs: 1 or more")
    if args.chain and not args.submit:
        parser.error("--chain submits jobs that know of each other; add --submit, or take --array N for one script")

    from engine.config import ConfigError
    from engine.slurm import script

    try:
        asked = script.request(args.config, args.overrides, args.chain, args.array)
        if args.submit:
            script.submit(asked)
        elif args.output:
            print(f"wrote {script.write(asked, args.output)}; submit it with sbatch")
        else:
            print(f"# Make its folder first: mkdir -p {asked.run_dir}/slurm\n", end="", file=sys.stderr)
            print(script.render(asked), end="")
    except ConfigError as error:
        print(f"{args.config}: {len(error.problems)} mistake{'s' * (len(error.problems) > 1)} in the configuration\n{error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
