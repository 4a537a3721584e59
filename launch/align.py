"""Align: torchrun --nproc-per-node N launch/align.py CONFIG.yaml [key=value ...]

Runs the stages that learn from conversations and preferences (stage: sft, reward, dpo). Every key is described in engine/config.py
and engine/stage_sections.py; any key can be overridden on the command line, such as dpo.beta=0.2 parallel.tp=2. Where the
configuration names no model, it takes the one of checkpoint.load. Exit codes: 0 done, 1 error, 2 usage or configuration.
"""

import sys

from engine.cli import main
from engine.stages import ALIGN

if __name__ == "__main__":
    sys.exit(main(__doc__, ALIGN))
