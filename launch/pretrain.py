"""Pretrain: torchrun --nproc-per-node N launch/pretrain.py CONFIG.yaml [key=value ...]

Runs the stages that learn from plain text (stage: pretrain). Every key is described in engine/config.py; any key can be
overridden on the command line, such as train.steps=20 parallel.tp=2. Exit codes: 0 done, 1 error, 2 usage or configuration.
"""

import sys

from engine.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
