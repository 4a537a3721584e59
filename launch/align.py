"""Align: torchrun --nproc-per-node N launch/align.py CONFIG.yaml [key=value ...]

Runs the stages that learn from conversations, preferences and rewards (stage: sft, reward, dpo, online_dpo, ppo, grpo). Every key is described
in engine/config.py and the files named *_sections.py beside it; any key can be overridden on the command line, such as dpo.beta=0.2 parallel.tp=2.
Where the configuration names no model, it takes the one of checkpoint.load. Exit codes: 0 done, 1 error, 2 usage or
configuration, 75 saved after SIGTERM or SIGUSR1 and to be started again.
"""

import sys

from engine.cli import main
from engine.stages import ALIGN

if __name__ == "__main__":
    sys.exit(main(__doc__, ALIGN))
