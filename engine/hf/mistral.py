"""Mistral: MistralForCausalLM of transformers, a Llama whose layers may all have a sliding window (arXiv 2310.06825).

As in llama.py. `sliding_window` is a number or null; a config.json without the key has transformers' 4096. Nemo and Small have heads wider or
narrower than hidden_size / num_attention_heads, which head_dim says.
Left out, and refused: biases, windows in some layers only (Ministral, another HF architecture), mixtures of experts.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "MistralForCausalLM", "mistral"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where MistralForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model) | llama.has_biases(model) | llama.windows_differ(model) | llama.has_experts(model),
           f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "sliding_window": model.sliding_window or None,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    return llama.common_fields(hf, rms_norm_eps=1e-6, rope_theta=10000.0) | {
        "family": "mistral",
        "max_position": hf.get("max_position_embeddings", 131072),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 8)),
        "sliding_window": hf.get("sliding_window", 4096) or 0,
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of MistralForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))
