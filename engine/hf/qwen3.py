"""Qwen3: Qwen3ForCausalLM of transformers, a Llama that normalises queries and keys head by head (arXiv 2505.09388).

As in llama.py, with head_dim 128 where config.json does not say; the sliding window is qwen2.py's.
Left out, and refused: attention_bias (on q, k, v and o, in no published model), windows in other patterns, mixtures of experts (qwen3_moe.py).
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names, qwen2
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Qwen3ForCausalLM", "qwen3"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Qwen3ForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model, qk_norm=True) | llama.has_biases(model) | qwen2.windows_alternate(model) | llama.has_experts(model),
           f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | qwen2.window_config(model) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "attention_bias": False,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    refuse(llama.attention_bias(hf), "config.json")
    return llama.common_fields(hf | {"head_dim": hf.get("head_dim", 128)}, rms_norm_eps=1e-6, rope_theta=10000.0) | qwen2.window_fields(hf) | {
        "family": "qwen3",
        "max_position": hf.get("max_position_embeddings", 32768),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 32)),
        "qk_norm": True,
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of Qwen3ForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))
