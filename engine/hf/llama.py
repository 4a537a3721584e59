"""Llama: LlamaForCausalLM of transformers, tied or not, grouped queries, any head_dim, every kind of RoPE scaling, biases.

config.json enters and keys of config.Model leave (`model_fields`), and back (`hf_config`); tensors go through the Pairs below.
HF's attention_bias puts a bias on q, k, v and o, its mlp_bias on gate, up and down; the engine has qkv_bias (q, k, v) and
linear_bias (everything). What does not coincide becomes a zero bias on the side that has one more, which computes the same.
Left out, and refused: q/k norms and sliding windows (other HF architectures), partial rotation, NoPE, mixtures of experts.
"""

from typing import Any, Callable, Mapping

from engine.config import Model
from engine.hf import names
from engine.hf.fields import differing, dtype_keys, head_of, named, need, refuse, rope_fields, rope_keys, to_model
from engine.hf.names import Pair, Shape, same

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"
EMBEDDING = "model.embed_tokens.weight"

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
HF_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x.

    seq_len: tokens per training sample, the longest position where model.max_position is 0.
    Raises HFError where LlamaForCausalLM cannot express the model.
    """
    refuse(inexpressible(model) | {
        f"transformers wants hidden_size({model.hidden_size}) divisible by num_attention_heads({model.num_attention_heads})":
            model.hidden_size % model.num_attention_heads != 0,
        f"model.sliding_window={model.sliding_window}": model.sliding_window > 0,
    } | has_experts(model), f"{ARCHITECTURE} cannot express this model")
    return common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "attention_bias": model.qkv_bias or model.linear_bias,
        "mlp_bias": model.linear_bias,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    has_bias = bool(hf.get("attention_bias") or hf.get("mlp_bias"))
    return common_fields(hf, rms_norm_eps=1e-6, rope_theta=10000.0) | {
        "family": "llama",
        "max_position": hf.get("max_position_embeddings", 2048),
        "num_query_groups": groups(hf, hf.get("num_key_value_heads")),
        "qkv_bias": has_bias,
        "linear_bias": has_bias,
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of LlamaForCausalLM, in model order."""
    return trunk(model, mlp)


to_hf, from_hf = names.ways(pairs)


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    shapes = names.hf_shapes(pairs(to_model(model_fields(hf))))
    flags = {".self_attn.": bool(hf.get("attention_bias")), ".mlp.": bool(hf.get("mlp_bias"))}
    absent = [part for part, has_bias in flags.items() if not has_bias]
    return {name: shape for name, shape in shapes.items()
            if not (name.endswith(".bias") and any(part in name for part in absent))}


def canonical(name: str) -> str:
    """The name as transformers writes it today; empty for a stored buffer that is no weight."""
    return "" if name.endswith(".rotary_emb.inv_freq") else name


# --- shared with the families that are Llama but for one part ---


def inexpressible(model: Model, qk_norm: bool = False, **fixed) -> dict[str, bool]:
    """What a Llama-shaped HF architecture does not have, as problems for `refuse`. qk_norm, fixed: fields of Model that it has other values of
    (fields.differing)."""
    fixed = {"rope_percent": 1.0, "qk_norm": qk_norm, **({"qk_norm_width": "head"} if qk_norm else {}), **fixed}
    return {
        f"model.norm={model.norm}": model.norm != "rmsnorm",
        f"model.activation={model.activation}": model.activation not in ACTIVATIONS and "activation" not in fixed,
        f"model.position={model.position}": model.position != "rope",
    } | differing(model, **fixed)


def has_experts(model: Model) -> dict[str, bool]:
    return {f"model.moe.num_experts={model.moe.num_experts}": model.moe.num_experts > 0}


def has_biases(model: Model) -> dict[str, bool]:
    return {"model.linear_bias=true": model.linear_bias, "model.qkv_bias=true": model.qkv_bias}


def windows_differ(model: Model) -> dict[str, bool]:
    """Of an architecture whose layers all see the same."""
    return {f"some layers have a sliding window and others none (model.sliding_window_freq={model.sliding_window_freq}, "
            f"full_attention_layers={model.full_attention_layers})": model.sliding_window > 0 and not all(model.window_layers)}


def common_config(model: Model, seq_len: int, dtype: str) -> dict[str, Any]:
    """The keys of config.json that the Llama-shaped architectures share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": ACTIVATIONS.get(model.activation),
        "max_position_embeddings": model.max_position or seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        **rope_keys(model),
        **dtype_keys(dtype),
    }


def attention_bias(hf: Mapping[str, Any]) -> dict[str, bool]:
    """Of a family whose MLPs take no bias: the engine has one on q, k and v, or on everything."""
    return {"attention_bias=true (on q, k, v and o, but not in MLPs) is not supported": bool(hf.get("attention_bias"))}


def common_fields(hf: Mapping[str, Any], rms_norm_eps: float, rope_theta: float, has_partial_rope: bool = False) -> dict[str, Any]:
    """The keys of config.Model that the Llama-shaped architectures share; the numbers are transformers' defaults."""
    vocab, hidden, ffn, layers, heads = need(hf, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                             "num_attention_heads")
    activation = hf.get("hidden_act", "silu")
    refuse({f"hidden_act={activation!r} is not supported ({', '.join(HF_ACTIVATIONS)} are)": activation not in HF_ACTIVATIONS},
           "config.json")
    head_dim = hf.get("head_dim") or 0
    return {
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads, "vocab_size": vocab,
        "head_dim": 0 if head_dim * heads == hidden else head_dim,
        "norm": "rmsnorm", "norm_eps": hf.get("rms_norm_eps", rms_norm_eps),
        "activation": HF_ACTIVATIONS[activation],
        "head": head_of(hf), "position": "rope", **rope_fields(hf, rope_theta, has_partial_rope),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "attention_dropout": hf.get("attention_dropout") or 0.0,
        "init_std": hf.get("initializer_range", 0.02),
    }


def groups(hf: Mapping[str, Any], kv_heads: int | None) -> int:
    """model.num_query_groups: 0 where every query head has its own key/value head."""
    return 0 if kv_heads in (None, hf["num_attention_heads"]) else kv_heads


PRE_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}

Part = Callable[[Model, str, str], list[Pair]]


def trunk(model: Model, mlp: Part, experts: Part | None = None, attention: Part | None = None, norms: Mapping[str, str] = PRE_NORMS) -> list[Pair]:
    """A Llama with parts of its own, each a function of (model, engine prefix, HF prefix). norms: engine name -> HF name within a layer."""
    found = [names.vocabulary("embedding.word_embeddings.weight", EMBEDDING, model)]
    for i, is_moe in enumerate(model.moe_layers):
        found += layer(model, f"decoder.layers.{i}.", f"model.layers.{i}.", experts if is_moe else mlp, attention or llama_attention, norms)
    found.append(names.same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size))
    return found + names.head(model)


def layer(model: Model, engine: str, hf: str, mlp: Part, attention: Part, norms: Mapping[str, str] = PRE_NORMS) -> list[Pair]:
    """One layer of trunk; mlp: its MLP or its experts."""
    return [
        *(same(f"{engine}{ours}.weight", f"{hf}{theirs}.weight", model.hidden_size) for ours, theirs in norms.items()),
        *attention(model, engine + "self_attention.", hf + "self_attn."),
        *mlp(model, engine + "mlp.", hf),
    ]


def llama_attention(model: Model, engine: str, hf: str, has_output_bias: bool = True) -> list[Pair]:
    """q, k, v and o, with biases and norms where the model has them. has_output_bias: may o have one where q, k and v do?"""
    h, width = model.hidden_size, model.num_attention_heads * model.head_size
    parts = [hf + "q_proj.", hf + "k_proj.", hf + "v_proj."]
    found = [names.qkv(engine + "linear_qkv.weight", [p + "weight" for p in parts], model, h),
             names.same(engine + "linear_proj.weight", hf + "o_proj.weight", h, width)]
    if model.qkv_bias or model.linear_bias:
        found.append(names.qkv(engine + "linear_qkv.bias", [p + "bias" for p in parts], model, is_optional=True))
    if model.linear_bias:
        found.append(names.same(engine + "linear_proj.bias", hf + "o_proj.bias", h, is_optional=True))
    elif model.qkv_bias and has_output_bias:
        found.append(names.must_be_zero(hf + "o_proj.bias", h))
    return found + qk_norms(model, engine, hf)


def qk_norms(model: Model, engine: str, hf: str) -> list[Pair]:
    if not model.qk_norm:
        return []
    heads = {"q": model.num_attention_heads, "k": model.kv_heads}
    return [names.same(f"{engine}{part}_layernorm.weight", f"{hf}{part}_norm.weight",
                       model.head_size * (num if model.qk_norm_width == "all" else 1)) for part, num in heads.items()]


def mlp(model: Model, engine: str, layer: str) -> list[Pair]:
    h, ffn, hf = model.hidden_size, model.ffn_hidden_size, layer + "mlp."
    gate_up = [hf + "gate_proj.", hf + "up_proj."]
    found = [names.stacked(engine + "linear_fc1.weight", [p + "weight" for p in gate_up], ffn, h),
             names.same(engine + "linear_fc2.weight", hf + "down_proj.weight", h, ffn)]
    if model.linear_bias:
        found += [names.stacked(engine + "linear_fc1.bias", [p + "bias" for p in gate_up], ffn, is_optional=True),
                  names.same(engine + "linear_fc2.bias", hf + "down_proj.bias", h, is_optional=True)]
    return found
