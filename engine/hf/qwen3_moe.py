"""Qwen3-MoE: Qwen3MoeForCausalLM of transformers, a Qwen3 whose MLPs are experts (arXiv 2505.09388).

As in qwen3.py; in the folder expert e of a layer keeps `mlp.experts.{e}.gate_proj, up_proj, down_proj`, the form that transformers 4.x holds
and that 5.x reads and writes. Which layers are dense (decoder_sparse_step, mlp_only_layers) and whether the weights of the chosen experts are
made to sum to 1 (norm_topk_prob) are carried; the sliding window holds in all layers. No token is dropped; a capacity is a matter of training.
Left out, and refused: biases, shared experts, sigmoid scores, Sinkhorn, one expert per token whose weight is made 1.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import count, named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Qwen3MoeForCausalLM cannot express the model."""
    moe = model.moe
    refuse(llama.inexpressible(model, qk_norm=True) | llama.has_biases(model) | llama.windows_differ(model) | {
        "model.moe.num_experts=0": not moe.num_experts,
        f"model.moe.shared_expert_ffn_hidden_size={moe.shared_expert_ffn_hidden_size}": moe.shared_expert_ffn_hidden_size > 0,
        f"model.moe.score={moe.score}": moe.score != "softmax",
        f"model.moe.balance={moe.balance}": moe.balance in ("sinkhorn", "aux_free"),
        f"model.moe.top_k={moe.top_k} with softmax_after_top_k=true": moe.top_k < 2 and moe.softmax_after_top_k,
        f"model.moe.scaling_factor={moe.scaling_factor}": moe.scaling_factor not in (0.0, 1.0),
    }, f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
        "attention_bias": False,
        "use_sliding_window": model.sliding_window > 0,
        "sliding_window": model.sliding_window or None,
        "max_window_layers": 0 if model.sliding_window else model.num_layers,  # of transformers 4.x; 5.x has the window in all layers
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": moe.softmax_after_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, is_moe in enumerate(model.moe_layers) if not is_moe],
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "output_router_logits": False,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    top_k, is_normalised = hf.get("num_experts_per_tok", 8), hf.get("norm_topk_prob", False)
    experts = hf.get("num_experts", hf.get("num_local_experts", 128))  # transformers 4.x and 5.x
    refuse(llama.attention_bias(hf) | {
        # megatron takes no softmax after a top-1 choice: it would have no gradient
        "num_experts_per_tok=1 with norm_topk_prob=true is not supported": top_k == 1 and is_normalised,
        "num_experts=0 is not supported; it makes a Qwen3ForCausalLM": not experts,
    }, "config.json")
    step, only = count(hf, "decoder_sparse_step", 1, least=1), hf.get("mlp_only_layers") or []
    return llama.common_fields(hf, rms_norm_eps=1e-6, rope_theta=10000.0) | {
        "family": "qwen3_moe",
        "max_position": hf.get("max_position_embeddings", 32768),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 4)),
        "qk_norm": True,
        "sliding_window": (hf.get("sliding_window", 4096) or 0) if hf.get("use_sliding_window") else 0,
        "moe": {
            "num_experts": experts, "top_k": top_k, "ffn_hidden_size": hf.get("moe_intermediate_size", 768),
            "dense_layers": [i for i in range(hf["num_hidden_layers"]) if i in only or (i + 1) % step],
            "balance": "aux_loss", "aux_loss_coeff": hf.get("router_aux_loss_coef", 0.001), "softmax_after_top_k": is_normalised,
        },
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of Qwen3MoeForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, _experts)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def _experts(model: Model, engine: str, layer: str) -> list[Pair]:
    h, ffn, hf = model.hidden_size, model.moe_ffn_hidden_size, layer + "mlp."
    found = [names.same(engine + "router.weight", hf + "gate.weight", model.moe.num_experts, h)]
    for e in range(model.moe.num_experts):
        ours, theirs = f"{engine}experts.local_experts.{e}.", f"{hf}experts.{e}."
        found += [names.stacked(ours + "linear_fc1.weight", [theirs + "gate_proj.weight", theirs + "up_proj.weight"], ffn, h),
                  names.same(ours + "linear_fc2.weight", theirs + "down_proj.weight", h, ffn)]
    return found
