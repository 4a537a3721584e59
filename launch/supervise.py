"""Supervise: python launch/supervise.py [options] launch/pretrain.py CONFIG.yaml [key=value ...]

Starts one process per rank, with torchrun's environment variables, and keeps the run going: when a rank dies all are ended and started again
from the newest verified checkpoint. SIGTERM and SIGUSR1 are handed to the ranks, which save and leave; no process is left behind.
For machines without Slurm; docs/launch.md tells how, also on several machines.

Exit codes: 0 done; 1 a fault too many; 2 usage or configuration; 75 saved, start the same command again.
"""

import sys

from engine.supervise.supervisor import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
