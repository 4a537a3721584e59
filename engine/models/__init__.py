"""Model families: one file each, giving the defaults of the family and its published sizes as literals.

A family file has DEFAULTS (keys of `model.*` that every member shares) and SIZES (name -> further keys).
`engine/config.py` lays them under the user's own keys.
"""

from engine.models import gpt2, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe

FAMILIES = {"llama": llama, "mistral": mistral, "mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "phi3": phi3,
            "olmo2": olmo2, "gpt2": gpt2}


def family_defaults(family: str, size: str) -> dict:
    """Keys of `model.*` for a family of FAMILIES and a size of its SIZES (or custom)."""
    module = FAMILIES[family]
    return {**module.DEFAULTS, **(module.SIZES[size] if size != "custom" else {})}
