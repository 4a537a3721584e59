"""Training stages, one file each. The name a configuration uses leads to `module:class`, imported when asked for.

TEXT learn from plain text (launch/pretrain.py), ALIGN from conversations, preferences and rewards (launch/align.py). A stage outside this
tree is named by its own `package.module:Class` and runs under either command.
"""

import importlib
import os
import sys

TEXT = {
    "pretrain": "engine.stages.pretrain:Pretrain",
    "continued": "engine.stages.continued:Continued",
    "long_context": "engine.stages.long_context:LongContext",
    "anneal": "engine.stages.anneal:Anneal",
}
ALIGN = {
    "sft": "engine.stages.sft:Sft",
    "reward": "engine.stages.reward:Reward",
    "dpo": "engine.stages.dpo:Dpo",
    "online_dpo": "engine.stages.online_dpo:OnlineDpo",
    "ppo": "engine.stages.ppo:Ppo",
    "grpo": "engine.stages.grpo:Grpo",
}
STAGES = TEXT | ALIGN


def build_stage(name: str):
    """A stage of STAGES, or the class that `package.module:Class` names, which may lie in the working folder.

    Raises ValueError where that cannot be imported; engine/checks.py has refused other names.
    """
    if name in STAGES:
        return _found(STAGES[name])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _found(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"stage={name} cannot be imported: {error}; it must be package.module:Class, found from the working folder or "
                         "PYTHONPATH") from error


def _found(path: str):
    module, cls = path.split(":")
    return getattr(importlib.import_module(module), cls)()
