"""Model families: one file each, giving the defaults of the family and its published sizes as literals.

A family file has DEFAULTS (keys of `model.*` that every member shares) and SIZES (name -> further keys).
`engine/config.py` lays them under the user's own keys.
"""

from engine.models import deepseek_v2, deepseek_v3, gpt2, llama, mixtral

FAMILIES = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3}


def family_defaults(family: str, size: str) -> dict:
    """Keys of `model.*` for a family of FAMILIES and a size of its SIZES (or custom); a size adds to a section of the defaults."""
    module = FAMILIES[family]
    fields = dict(module.DEFAULTS)
    for key, value in (module.SIZES[size] if size != "custom" else {}).items():
        fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
    return fields
