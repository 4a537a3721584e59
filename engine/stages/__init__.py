"""Training stages, one file each. STAGES maps the name a configuration uses to `module:class`, imported when asked for."""

import importlib

STAGES = {"pretrain": "engine.stages.pretrain:Pretrain"}


def build_stage(name: str):
    """A stage of STAGES; engine/checks.py has refused other names."""
    module, cls = STAGES[name].split(":")
    return getattr(importlib.import_module(module), cls)()
