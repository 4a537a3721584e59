"""Mixtral: MixtralForCausalLM of transformers, a Llama whose MLPs are experts (arXiv 2401.04088).

As in llama.py; in the folder expert e of a layer keeps gate, up and down as `block_sparse_moe.experts.{e}.w1, w3, w2`, the form
that transformers 4.x holds and that 5.x reads and writes. transformers renormalises the weights of the chosen experts and drops no
token; an engine model that routes otherwise is refused, except for a capacity, which is a matter of training.
Left out, and refused: biases, shared experts, dense layers among the sparse, sigmoid scores, Sinkhorn, one expert per token.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "MixtralForCausalLM", "mixtral"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x.

    seq_len: tokens per training sample, the longest position where model.max_position is 0.
    Raises HFError where MixtralForCausalLM cannot express the model.
    """
    moe = model.moe
    refuse(llama.inexpressible(model) | llama.has_biases(model) | llama.windows_differ(model) | {
        f"some layers are dense (model.moe.layer_freq={moe.layer_freq}, first_dense_layers={moe.first_dense_layers}, dense_layers={moe.dense_layers})":
            not all(model.moe_layers),
        f"model.moe.shared_expert_ffn_hidden_size={moe.shared_expert_ffn_hidden_size}": moe.shared_expert_ffn_hidden_size > 0,
        f"model.moe.score={moe.score}": moe.score != "softmax",
        f"model.moe.top_k={moe.top_k}": moe.top_k < 2,
        f"model.moe.balance={moe.balance}": moe.balance in ("sinkhorn", "aux_free"),
        "model.moe.softmax_after_top_k=false": not moe.softmax_after_top_k,
        f"model.moe.scaling_factor={moe.scaling_factor}": moe.scaling_factor not in (0.0, 1.0),
    }, f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.moe_ffn_hidden_size,
        "sliding_window": model.sliding_window or None,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "output_router_logits": False,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    # megatron takes no softmax after a top-1 choice (it would have no gradient), and transformers none before it.
    refuse({"num_experts_per_tok=1 is not supported (2 and more are)": hf.get("num_experts_per_tok") == 1}, "config.json")
    return llama.common_fields(hf, rms_norm_eps=1e-5, rope_theta=1e6) | {
        "family": "mixtral",
        "max_position": hf.get("max_position_embeddings", 131072),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 8)),
        "sliding_window": hf.get("sliding_window") or 0,
        "moe": {
            "num_experts": hf.get("num_local_experts", 8), "top_k": hf.get("num_experts_per_tok", 2),
            "balance": "aux_loss", "aux_loss_coeff": hf.get("router_aux_loss_coef", 0.001), "softmax_after_top_k": True,
        },
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of MixtralForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, _experts)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def _experts(model: Model, engine: str, layer: str) -> list[Pair]:
    h, ffn, hf = model.hidden_size, model.moe_ffn_hidden_size, layer + "block_sparse_moe."
    found = [names.same(engine + "router.weight", hf + "gate.weight", model.moe.num_experts, h)]
    for e in range(model.moe.num_experts):
        ours, theirs = f"{engine}experts.local_experts.{e}.", f"{hf}experts.{e}."
        found += [names.stacked(ours + "linear_fc1.weight", [theirs + "w1.weight", theirs + "w3.weight"], ffn, h),
                  names.same(ours + "linear_fc2.weight", theirs + "w2.weight", h, ffn)]
    return found
