"""THE SEAM: the only folder that imports megatron, transformer_engine or apex.

Importing it prepares megatron's own import: without a GPU its CUDA calls are replaced (cpu.py), and its notes about optional
packages are silenced: which layers are used instead is the configuration's train.backend, printed at the start of a run.
"""

import logging
import warnings

import torch

from engine.mcore import cpu

for _message in (
    "(?s).*(Apex|Transformer Engine).*not installed.*",
    "full scope is deprecated",
    ".*is deprecated. Please use.*_single.*",
    "(?s).*CPU RNG state changed within GPU RNG context.*",
    ".*legacy GroupedMLP.*",
    ".*(load_state_dict. is deprecated|DTensor instead and we are deprecating).*",
    "The .grad attribute of a Tensor that is not a leaf.*",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", category=DeprecationWarning, module="(megatron|torch).*")
logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    cpu.install()
