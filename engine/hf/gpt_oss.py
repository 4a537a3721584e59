"""gpt-oss: GptOssForCausalLM of transformers, experts and biases everywhere, attention sinks (arXiv 2508.10925).

As in llama.py. A layer's experts lie in one tensor per matrix, [experts, in, out], gate and up column by column side by side; the engine has
them expert by expert, [gate; up]. transformers adds the balancing loss only where output_router_logits is true, so elsewhere balance is none.
Left out, and refused: the published MXFP4 folders (load them with transformers, dequantised, and save them again), attention without biases.
"""

from typing import Any, Mapping

import torch
from torch import Tensor

from engine.config import Model
from engine.hf import gemma2, llama, names
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "GptOssForCausalLM", "gpt_oss"
EMBEDDING = llama.EMBEDDING
YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096)


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where GptOssForCausalLM cannot express the model."""
    moe = model.moe
    refuse(llama.inexpressible(model, linear_bias=True, attention_sinks=True, activation="clamped_swiglu")
           | gemma2.turns_problems(model) | {
        "model.moe.num_experts=0": moe.num_experts == 0,
        "some layers are dense": not all(model.moe_layers),
        f"model.moe.top_k={moe.top_k}": moe.top_k < 2,
        f"model.moe.shared_expert_ffn_hidden_size={moe.shared_expert_ffn_hidden_size}": moe.shared_expert_ffn_hidden_size > 0,
        f"model.moe.score={moe.score}": moe.score != "softmax",
        f"model.moe.balance={moe.balance}": moe.balance in ("sinkhorn", "aux_free"),
        "model.moe.softmax_after_top_k=false": not moe.softmax_after_top_k,
        f"model.moe.scaling_factor={moe.scaling_factor}": moe.scaling_factor not in (0.0, 1.0),
    }, f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | gemma2.turns_config(model) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "hidden_act": "silu",
        "attention_bias": True,
        "intermediate_size": model.moe_ffn_hidden_size,
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "experts_per_token": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "output_router_logits": moe.balance != "none",
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    refuse({
        "attention_bias=false is not supported": hf.get("attention_bias", True) is False,
        "num_experts_per_tok=1 is not supported (2 and more are)": hf.get("num_experts_per_tok") == 1,
        f"hidden_act={hf.get('hidden_act')!r} is not supported (silu is)": hf.get("hidden_act", "silu") != "silu",
    }, "config.json")
    known = {"head_dim": 64, **hf}
    if not (hf.get("rope_scaling") or hf.get("rope_parameters")):
        known["rope_scaling"] = YARN
    return llama.common_fields(known, rms_norm_eps=1e-5, rope_theta=150000.0) | gemma2.turns_fields(hf, 128, 2) | {
        "family": "gpt_oss",
        "max_position": hf.get("max_position_embeddings", 131072),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 8)),
        "activation": "clamped_swiglu", "swiglu_alpha": hf.get("swiglu_alpha", 1.702), "swiglu_limit": hf.get("swiglu_limit", 7.0),
        "attention_sinks": True, "qkv_bias": True, "linear_bias": True,
        "moe": {
            "num_experts": hf.get("num_local_experts", 128), "top_k": hf.get("num_experts_per_tok", 4), "softmax_after_top_k": True,
            "balance": "aux_loss" if hf.get("output_router_logits") else "none", "aux_loss_coeff": hf.get("router_aux_loss_coef", 0.001),
        },
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of GptOssForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, _experts, _attention)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def _attention(model: Model, engine: str, hf: str) -> list[Pair]:
    return llama.llama_attention(model, engine, hf) + [
        names.same(engine + "core_attention.softmax_offset", hf + "sinks", model.num_attention_heads)]


def _experts(model: Model, engine: str, layer: str) -> list[Pair]:
    h, ffn, num, hf = model.hidden_size, model.moe_ffn_hidden_size, model.moe.num_experts, layer + "mlp."

    def each(ours: str, theirs: str, shape: Shape, join, split) -> list[Pair]:
        return [Pair(f"{engine}experts.local_experts.{e}.{ours}", {names.slice_of(f"{hf}experts.{theirs}", e, num): shape}, join, split)
                for e in range(num)]

    return [
        names.same(engine + "router.weight", hf + "router.weight", num, h),
        names.same(engine + "router.bias", hf + "router.bias", num),
        *each("linear_fc1.weight", "gate_up_proj", (h, 2 * ffn), lambda t: _gate_then_up(t.T), lambda t: (_taking_turns(t).T,)),
        *each("linear_fc1.bias", "gate_up_proj_bias", (2 * ffn,), _gate_then_up, lambda t: (_taking_turns(t),)),
        *each("linear_fc2.weight", "down_proj", (ffn, h), lambda t: t.T, lambda t: (t.T,)),
        *each("linear_fc2.bias", "down_proj_bias", (h,), lambda t: t, lambda t: (t,)),
    ]


def _gate_then_up(t: Tensor) -> Tensor:
    """Rows of gate and up in turn -> [gate; up]."""
    return torch.cat([t[0::2], t[1::2]])


def _taking_turns(t: Tensor) -> Tensor:
    """The inverse of _gate_then_up."""
    return torch.stack(t.chunk(2), dim=1).flatten(0, 1)
