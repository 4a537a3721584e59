"""OLMo-2: Olmo2ForCausalLM of transformers, a Llama that normalises what attention and MLP put out, and not what goes in (arXiv 2501.00656).

As in llama.py. Queries and keys are normalised over all heads together. Its `post_attention_layernorm` stands behind attention, where Llama's
of the same name stands before the MLP.
Left out, and refused: attention_bias (in no published model), sliding windows (OLMo-3, another HF architecture), mixtures of experts.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Olmo2ForCausalLM", "olmo2"
EMBEDDING = llama.EMBEDDING
POST_NORMS = {"self_attn_bda.post_layernorm": "post_attention_layernorm", "mlp_bda.post_layernorm": "post_feedforward_layernorm"}


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Olmo2ForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model, qk_norm=True, qk_norm_width="all", norm_place="post", sliding_window=0) | llama.has_biases(model)
           | llama.has_experts(model), f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "attention_bias": False,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    refuse(llama.attention_bias(hf), "config.json")
    return llama.common_fields(hf, rms_norm_eps=1e-5, rope_theta=10000.0) | {
        "family": "olmo2",
        "max_position": hf.get("max_position_embeddings", 2048),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads")),
        "qk_norm": True, "qk_norm_width": "all", "norm_place": "post",
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of Olmo2ForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, norms=POST_NORMS)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))
