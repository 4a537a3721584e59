"""Model families: one file each, giving the defaults of the family and its published sizes as literals.

A family file has DEFAULTS (keys of `model.*` that every member shares) and SIZES (name -> further keys).
`engine/config.py` lays them under the user's own keys.
"""

from engine.models import deepseek_v2, deepseek_v3, gemma2, gemma3, gpt2, gpt_oss, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe

FAMILIES = {"llama": llama, "mistral": mistral, "mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "phi3": phi3,
            "olmo2": olmo2, "gemma2": gemma2, "gemma3": gemma3, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "gpt2": gpt2}


def family_defaults(family: str, size: str) -> dict:
    """Keys of `model.*` for a family of FAMILIES and a size of its SIZES (or custom); a size adds to a section of the defaults."""
    module = FAMILIES[family]
    fields = dict(module.DEFAULTS)
    for key, value in (module.SIZES[size] if size != "custom" else {}).items():
        fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
    return fields
