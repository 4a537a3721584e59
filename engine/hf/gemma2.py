"""Gemma 2: Gemma2ForCausalLM of transformers, a Llama with capped logits and four norms a layer (arXiv 2408.00118).

As in llama.py. Weights of norms are stored as they are, w for a factor of 1 + w. Its `post_attention_layernorm` stands behind attention, where
Llama's of the same name stands before the MLP. Embeddings are multiplied by sqrt(hidden_size), attention logits divided by
sqrt(query_pre_attn_scalar), and layers take turns: windows, and one in sliding_window_freq that sees everything.
Left out, and refused: attention biases, bidirectional attention, layers that take turns in another pattern.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Gemma2ForCausalLM", "gemma2"
EMBEDDING = llama.EMBEDDING
NORMS = {"input_layernorm": "input_layernorm", "self_attn_bda.post_layernorm": "post_attention_layernorm",
         "pre_mlp_layernorm": "pre_feedforward_layernorm", "mlp_bda.post_layernorm": "post_feedforward_layernorm"}
FIXED = dict(norm_place="both", norm_zero_centered=True, scale_embeddings=True)


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Gemma2ForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model, **FIXED, attention_softcap=None, logits_softcap=None, query_pre_attn_scalar=None) | common_problems(model),
           f"{ARCHITECTURE} cannot express this model")
    return common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logits_softcap or None,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    return common_fields(hf, rope_theta=10000.0, freq=2) | {
        "family": "gemma2",
        "max_position": hf.get("max_position_embeddings", 8192),
        "attention_softcap": hf.get("attn_logit_softcapping", 50.0) or 0.0,
        "logits_softcap": hf.get("final_logit_softcapping", 30.0) or 0.0,
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of Gemma2ForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, norms=NORMS)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


# --- shared with Gemma 3; the turns of layers with gpt-oss too ---


def common_problems(model: Model) -> dict[str, bool]:
    """What neither architecture has, as problems for `refuse`."""
    scalar = model.query_pre_attn_scalar or model.head_size
    return llama.has_biases(model) | llama.has_experts(model) | turns_problems(model) | {
        f"transformers wants hidden_size({model.hidden_size}) divisible by num_attention_heads({model.num_attention_heads})":
            model.hidden_size % model.num_attention_heads != 0,
        f"model.query_pre_attn_scalar={scalar} is no whole number": scalar != int(scalar),
    }


def turns_problems(model: Model) -> dict[str, bool]:
    return {f"model.full_attention_layers={model.full_attention_layers}": model.sliding_window > 0 and model.full_attention_layers > 0}


def common_config(model: Model, seq_len: int, dtype: str) -> dict[str, Any]:
    """The keys of config.json that both architectures share."""
    config = llama.common_config(model, seq_len, dtype)
    return config | turns_config(model) | {
        "intermediate_size": model.ffn_hidden_size,
        "hidden_activation": config["hidden_act"],
        "attention_bias": False,
        "query_pre_attn_scalar": int(model.query_pre_attn_scalar or model.head_size),
    }


def turns_config(model: Model) -> dict[str, Any]:
    """Keys of config.json for layers of both kinds."""
    return {"sliding_window": model.sliding_window or 4096,  # transformers wants one for its masks, also where no layer has it
            "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in model.window_layers]}


def common_fields(hf: Mapping[str, Any], rope_theta: float, freq: int) -> dict[str, Any]:
    """The keys of config.Model that both architectures share. freq: one layer in so many sees everything, where config.json is silent."""
    refuse(llama.attention_bias(hf) | {
        "use_bidirectional_attention=true is not supported": bool(hf.get("use_bidirectional_attention")),
    }, "config.json")
    (scalar,) = need({"query_pre_attn_scalar": 256, **hf}, "query_pre_attn_scalar")
    silent = {"tie_word_embeddings": True, "hidden_act": hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh", "head_dim": 256}
    fields = llama.common_fields({**hf, **{key: value for key, value in silent.items() if key == "hidden_act" or hf.get(key) is None}},
                                 rms_norm_eps=1e-6, rope_theta=rope_theta)
    heads = hf.get("num_key_value_heads", 4)
    return fields | turns_fields(hf, 4096, freq) | FIXED | {
        "num_query_groups": llama.groups(hf, heads),
        "query_pre_attn_scalar": scalar,
    }


def turns_fields(hf: Mapping[str, Any], window: int, freq: int) -> dict[str, Any]:
    """`sliding_window` and `sliding_window_freq`. window, freq: where config.json is silent. Raises HFError for another pattern."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", window) or 0
    types = hf.get("layer_types") or ["sliding_attention" if (i + 1) % freq else "full_attention" for i in range(layers)]
    if not window or set(types) == {"full_attention"}:
        return {}
    freq = types.index("full_attention") + 1 if "full_attention" in types else 1
    wanted = ["sliding_attention" if freq == 1 or (i + 1) % freq else "full_attention" for i in range(layers)]
    refuse({f"layer_types={types} is no pattern of windows in all layers but every n-th": types != wanted}, "config.json")
    return {"sliding_window": window, "sliding_window_freq": freq}
