"""THE SEAM: the only folder that imports megatron, transformer_engine or apex.

Importing it prepares megatron's own import: without a GPU its CUDA calls are replaced (cpu.py), and its notes about optional
packages are silenced: which layers are used instead is the configuration's train.backend, printed at the start of a run.
A Transformer Engine that cannot be imported whole is hidden, because megatron-core takes any trace of it for all of it and
fails in its own import; te_problem says why, for whoever asks for the te backend.
"""

import importlib
import importlib.util
import logging
import sys
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



def check_transformer_engine() -> str:
    """Why Transformer Engine cannot be used, empty if it can. A broken one is made invisible to later imports."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
        return ""
    except Exception as error:  # without cuDNN a RuntimeError, without its core library an OSError
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None
        return f"Transformer Engine cannot be imported ({type(error).__name__}: {error})"


if torch.cuda.is_available():
    te_problem = check_transformer_engine()
else:
    te_problem = "there is no GPU"
    cpu.install()

from megatron.core.transformer.moe import moe_utils  # noqa: E402 (only now can it be imported)

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # undefined upstream when Transformer Engine is missing
