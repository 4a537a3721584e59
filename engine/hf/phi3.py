"""Phi-3, Phi-3.5 and Phi-4: Phi3ForCausalLM of transformers, a Llama with q, k, v in one matrix and gate, up in another (arXiv 2404.14219).

As in llama.py. `qkv_proj` is [all q; all k; all v], the engine's linear_qkv goes group by group; `gate_up_proj` is the engine's linear_fc1.
LongRoPE (arXiv 2402.13753), also under its old name "su", has its factor from max_position_embeddings / original_max_position_embeddings.
Phi-4-mini rotates three quarters of a head, which partial_rotary_factor says.
Left out, and refused: biases, other kinds of RoPE scaling, heads of a size of their own, mixtures of experts.
"""

from typing import Any, Mapping

import torch
from torch import Tensor

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Phi3ForCausalLM", "phi3"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Phi3ForCausalLM cannot express the model."""
    scaling, longest = model.rope_scaling, model.max_position or seq_len
    is_long = scaling.kind == "longrope"
    refuse(llama.inexpressible(model, rope_percent=model.rope_percent) | llama.has_biases(model) | llama.windows_differ(model)
           | llama.has_experts(model) | {
        f"model.head_dim={model.head_dim}": model.head_size * model.num_attention_heads != model.hidden_size,
        f"model.rope_scaling.kind={scaling.kind}": scaling.kind not in ("none", "longrope"),
        f"model.rope_scaling.factor({scaling.factor:g}) is not max_position({longest}) / original_max_position({scaling.original_max_position}), "
        "from which transformers computes it": is_long and longest / scaling.original_max_position != scaling.factor,
        f"model.rope_scaling.attention_factor={scaling.attention_factor:g}": is_long and scaling.attention_factor != 0,
    }, f"{ARCHITECTURE} cannot express this model")
    config = llama.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "sliding_window": model.sliding_window or None,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
    }
    config["rope_parameters"]["partial_rotary_factor"] = model.rope_percent
    if model.rope_percent != 1.0:
        config["partial_rotary_factor"] = model.rope_percent
    if is_long:  # transformers 4.x takes these three keys of rope_scaling and no others
        config["rope_scaling"] = {"type": "longrope", "short_factor": scaling.short_factor, "long_factor": scaling.long_factor}
        config["original_max_position_embeddings"] = scaling.original_max_position
    return config


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    hf = _renamed(hf)
    return llama.common_fields(hf, rms_norm_eps=1e-5, rope_theta=10000.0, has_partial_rope=True) | {
        "family": "phi3",
        "max_position": hf.get("max_position_embeddings", 4096),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads")),
        "sliding_window": hf.get("sliding_window") or 0,
        "hidden_dropout": hf.get("resid_pdrop") or 0.0,
    }


def _renamed(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with today's name of LongRoPE, and the length it starts from; other scalings are refused, as transformers refuses them."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return dict(hf)  # refused by rope_fields
    kind = rope.get("rope_type") or rope.get("type") or "default"
    refuse({f"RoPE type {kind!r} is not Phi-3's (default and longrope, or su, are)": kind not in ("default", "longrope", "su", "yarn")}, "config.json")
    kind = "default" if kind == "default" else "longrope"  # transformers takes "su" and "yarn" for it, as Phi-3's first files have them
    return {"original_max_position_embeddings": 4096, **hf, "rope_scaling": {**rope, "rope_type": kind}}


def pairs(model: Model) -> list[Pair]:
    """The tensors of Phi3ForCausalLM, in model order."""
    return llama.trunk(model, _mlp, attention=_attention)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def _attention(model: Model, engine: str, hf: str) -> list[Pair]:
    h, width, kv = model.hidden_size, model.num_attention_heads * model.head_size, model.kv_heads * model.head_size

    def join(stacked: Tensor) -> Tensor:
        return names.fuse_qkv(model, *stacked.split([width, kv, kv]))

    def split(fused: Tensor) -> tuple[Tensor]:
        return (torch.cat(names.split_qkv(model, fused)),)

    return [Pair(engine + "linear_qkv.weight", {hf + "qkv_proj.weight": (width + 2 * kv, h)}, join, split),
            names.same(engine + "linear_proj.weight", hf + "o_proj.weight", h, width)]


def _mlp(model: Model, engine: str, layer: str) -> list[Pair]:
    h, ffn = model.hidden_size, model.ffn_hidden_size
    return [names.same(engine + "linear_fc1.weight", layer + "mlp.gate_up_proj.weight", 2 * ffn, h),
            names.same(engine + "linear_fc2.weight", layer + "mlp.down_proj.weight", h, ffn)]
