"""Hugging Face folders in and out: one file per family, the table below, and load.py, export.py, verify.py around them.

A family file offers hf_config, model_fields, hf_shapes, canonical, pairs, from_hf and to_hf; llama.py is the one to read first.
Left out: tokenizers (files are copied, never read as such) and architectures that are no row of the table.
"""

from typing import Any, Mapping

from engine.hf import deepseek_v2, deepseek_v3, gemma2, gemma3, gpt2, gpt_oss, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe
from engine.hf.fields import HFError, classifier, refuse_texts, to_model

FAMILIES = {"llama": llama, "mistral": mistral, "mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "phi3": phi3,
            "olmo2": olmo2, "gemma2": gemma2, "gemma3": gemma3, "deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "gpt2": gpt2}


def family_of(hf: Mapping[str, Any]):
    """The family module that reads a folder with this config.json. Raises HFError when none does."""
    if hf.get("quantization_config"):
        raise HFError("config.json has a quantization_config; convert the unquantised weights")
    refuse_texts(hf)
    architectures, model_type = hf.get("architectures") or [], hf.get("model_type")
    for family in FAMILIES.values():
        if architectures[:1] in ([family.ARCHITECTURE], [classifier(family.ARCHITECTURE)]) or (not architectures and model_type == family.MODEL_TYPE):
            return family
    known = ", ".join(family.ARCHITECTURE for family in FAMILIES.values())
    raise HFError(f"config.json names architectures={architectures}, model_type={model_type!r}; known: {known}, and with a scalar head "
                  "their ...ForSequenceClassification")


def read_model(hf: Mapping[str, Any]):
    """config.Model of a config.json. Raises HFError for what the engine would compute differently."""
    return to_model(family_of(hf).model_fields(hf))
