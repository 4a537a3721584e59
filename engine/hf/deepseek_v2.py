"""DeepSeek-V2: DeepseekV2ForCausalLM of transformers, latent attention and experts beside shared ones (arXiv 2405.04434).

As in llama.py. A head of HF's is [dims without position | dims that RoPE turns, pairs side by side]; the engine's begins with the turned
dims, their pairs half a width apart, so the rows of two matrices are put in another order. Experts are kept one by one, the form that
transformers 4.x and 5.x read and write; the shared experts are one MLP. DeepSeek-V3 differs in its router and config.json (deepseek_v3.py).
Left out, and refused: biases, renormalised router weights (transformers ignores norm_topk_prob here), rope_interleave=false, quantised folders.
"""

from functools import partial
from typing import Any, Mapping

import torch
from torch import Tensor

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "DeepseekV2ForCausalLM", "deepseek_v2"
EMBEDDING = llama.EMBEDDING

# What transformers takes where config.json is silent.
DEFAULTS = dict(max_position_embeddings=2048, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1407, first_k_dense_replace=0, routed_scaling_factor=1.0,
                num_experts_per_tok=None)


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x.

    seq_len: tokens per training sample, the longest position where model.max_position is 0.
    Raises HFError where DeepseekV2ForCausalLM cannot express the model.
    """
    moe = model.moe
    refuse(inexpressible(model) | {
        f"transformers wants hidden_size({model.hidden_size}) divisible by num_attention_heads({model.num_attention_heads})":
            model.hidden_size % model.num_attention_heads != 0,
        f"model.moe.score={moe.score}": moe.score != "softmax",
        "model.moe.softmax_after_top_k=true": moe.softmax_after_top_k,
        f"model.moe.balance={moe.balance}": moe.balance in ("sinkhorn", "aux_free"),
        f"model.moe.group_score_top={moe.group_score_top}": moe.num_groups > 0 and moe.group_score_top != 1,
    }, f"{ARCHITECTURE} cannot express this model")
    return common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if moe.num_groups else "greedy",
        "n_group": moe.num_groups or 1,
        "topk_group": moe.group_top_k if moe.num_groups else 1,
        "aux_loss_alpha": moe.aux_loss_coeff,
        "seq_aux": moe.balance == "seq_aux_loss",
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    method = hf.get("topk_method", "greedy")
    refuse({
        f"topk_method={method!r} is not supported (greedy and group_limited_greedy are)": method not in ("greedy", "group_limited_greedy"),
        f"scoring_func={hf.get('scoring_func')!r} is not supported (softmax is)": hf.get("scoring_func", "softmax") != "softmax",
        "norm_topk_prob=true is not supported: transformers does not renormalise this architecture's weights": bool(hf.get("norm_topk_prob")),
    }, "config.json")
    groups = need(hf, "n_group", "topk_group") if method == "group_limited_greedy" else (0, 0)
    fields = common_fields(hf, DEFAULTS)
    fields["moe"] |= {"softmax_after_top_k": False, "balance": "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss",
                      "aux_loss_coeff": hf.get("aux_loss_alpha", 0.001), "num_groups": groups[0], "group_top_k": groups[1]}
    return fields | {"family": "deepseek_v2"}


def pairs(model: Model) -> list[Pair]:
    """The tensors of DeepseekV2ForCausalLM, in model order."""
    return trunk(model, router)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


# --- shared with DeepSeek-V3 ---


def inexpressible(model: Model, has_mtp: bool = False) -> dict[str, bool]:
    """What neither architecture has, as problems for `refuse`. has_mtp: layers for further tokens?"""
    moe = model.moe
    return llama.inexpressible(model, is_deepseek=True, has_mtp=has_mtp) | llama.windows_differ(model) | {
        "model.mla.kv_lora_rank=0 (no latent attention)": not model.is_latent,
        "model.moe.num_experts=0": moe.num_experts == 0,
        f"model.moe.dense_layers={moe.dense_layers}": bool(moe.dense_layers),
        f"model.moe.layer_freq={moe.layer_freq}": moe.layer_freq != 1,
        f"model.moe.top_k={moe.top_k}": moe.top_k < 2,
        f"model.moe.shared_expert_ffn_hidden_size={moe.shared_expert_ffn_hidden_size} is no multiple of an expert's {model.moe_ffn_hidden_size}, "
        "and there must be shared experts": moe.shared_expert_ffn_hidden_size == 0 or moe.shared_expert_ffn_hidden_size % model.moe_ffn_hidden_size != 0,
    }


def common_config(model: Model, seq_len: int, dtype: str) -> dict[str, Any]:
    """The keys of config.json that both architectures share."""
    mla, moe, config = model.mla, model.moe, llama.common_config(model, seq_len, dtype)
    del config["head_dim"]  # transformers sets it to the turned dims by itself
    return config | {
        "intermediate_size": model.ffn_hidden_size,
        "attention_bias": False,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared_expert_ffn_hidden_size // model.moe_ffn_hidden_size,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": moe.scaling_factor or 1.0,
        "rope_interleave": True,
    }


def common_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.Model that both architectures share, the router's own left out."""
    heads, groups = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    refuse({
        "attention_bias=true is not supported": bool(hf.get("attention_bias")),
        "mlp_bias=true is not supported": bool(hf.get("mlp_bias")),
        "rope_interleave=false is not supported (true is)": hf.get("rope_interleave", True) is False,
        f"moe_layer_freq={hf.get('moe_layer_freq')} is not supported (1 is)": hf.get("moe_layer_freq", 1) != 1,
        f"num_key_value_heads={groups} differs from num_attention_heads={heads}, which latent attention does not know": groups not in (None, heads),
        "num_experts_per_tok=1 is not supported (2 and more are)": hf.get("num_experts_per_tok") == 1,
    }, "config.json")
    numbers = {**defaults, **{key: hf[key] for key in defaults if key in hf}}
    rank = numbers.pop("q_lora_rank")  # null: none
    need(numbers, *numbers)
    return llama.common_fields({key: value for key, value in hf.items() if key != "head_dim"}, rms_norm_eps=1e-6, rope_theta=10000.0) | {
        "max_position": numbers["max_position_embeddings"],
        "mla": {"q_lora_rank": rank or 0} | {key: numbers[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
        "moe": {
            "num_experts": numbers["n_routed_experts"], "top_k": numbers["num_experts_per_tok"],
            "ffn_hidden_size": numbers["moe_intermediate_size"],
            "shared_expert_ffn_hidden_size": numbers["n_shared_experts"] * numbers["moe_intermediate_size"],
            "first_dense_layers": numbers["first_k_dense_replace"], "scaling_factor": numbers["routed_scaling_factor"],
        },
    }


def trunk(model: Model, router: llama.Part) -> list[Pair]:
    """All tensors, a layer's router being `router(model, engine prefix, HF prefix)`."""
    return llama.trunk(model, llama.mlp, partial(_experts, router), _attention)


def sparse_layer(model: Model, router: llama.Part, engine: str, hf: str) -> list[Pair]:
    """One layer with experts."""
    return llama.layer(model, engine, hf, partial(_experts, router), _attention)


def router(model: Model, engine: str, hf: str) -> list[Pair]:
    return [names.same(engine + "weight", hf + "weight", model.moe.num_experts, model.hidden_size)]


def _experts(router: llama.Part, model: Model, engine: str, layer: str) -> list[Pair]:
    h, moe, hf = model.hidden_size, model.moe, layer + "mlp."
    found = [pair for e in range(moe.num_experts)
             for pair in _mlp(h, model.moe_ffn_hidden_size, f"{engine}experts.local_experts.{e}.", f"{hf}experts.{e}.")]
    shared = _mlp(h, moe.shared_expert_ffn_hidden_size, engine + "shared_experts.", hf + "shared_experts.")
    return router(model, engine + "router.", hf + "gate.") + found + shared


def _mlp(hidden: int, width: int, engine: str, hf: str) -> list[Pair]:
    return [names.stacked(engine + "linear_fc1.weight", [hf + "gate_proj.weight", hf + "up_proj.weight"], width, hidden),
            names.same(engine + "linear_fc2.weight", hf + "down_proj.weight", hidden, width)]


def _attention(model: Model, engine: str, hf: str) -> list[Pair]:
    h, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    q_rows, rope = heads * model.head_size, mla.qk_rope_head_dim

    def queries(name: str, theirs: str, width: int) -> Pair:
        return Pair(engine + name, {hf + theirs: (q_rows, width)}, partial(_rope_first, heads, rope), partial(_rope_last, heads, rope))

    if mla.q_lora_rank:
        found = [names.same(engine + "linear_q_down_proj.weight", hf + "q_a_proj.weight", mla.q_lora_rank, h),
                 names.same(engine + "q_layernorm.weight", hf + "q_a_layernorm.weight", mla.q_lora_rank),
                 queries("linear_q_up_proj.weight", "q_b_proj.weight", mla.q_lora_rank)]
    else:
        found = [queries("linear_q_proj.weight", "q_proj.weight", h)]
    down = (mla.kv_lora_rank + rope, h)
    return found + [
        Pair(engine + "linear_kv_down_proj.weight", {hf + "kv_a_proj_with_mqa.weight": down},
             lambda t: torch.cat([t[:-rope], _halves(t[-rope:])]), lambda t: (torch.cat([t[:-rope], _side_by_side(t[-rope:])]),)),
        names.same(engine + "kv_layernorm.weight", hf + "kv_a_layernorm.weight", mla.kv_lora_rank),
        names.same(engine + "linear_kv_up_proj.weight", hf + "kv_b_proj.weight", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        names.same(engine + "linear_proj.weight", hf + "o_proj.weight", h, heads * mla.v_head_dim),
    ]


def _rope_first(heads: int, rope: int, rows: Tensor) -> Tensor:
    """HF's query rows -> the engine's, head by head."""
    by_head = rows.unflatten(0, (heads, -1))
    return torch.cat([_halves(by_head[:, -rope:], 1), by_head[:, :-rope]], dim=1).flatten(0, 1)


def _rope_last(heads: int, rope: int, rows: Tensor) -> tuple[Tensor]:
    """The inverse of _rope_first."""
    by_head = rows.unflatten(0, (heads, -1))
    return (torch.cat([by_head[:, rope:], _side_by_side(by_head[:, :rope], 1)], dim=1).flatten(0, 1),)


def _halves(t: Tensor, dim: int = 0) -> Tensor:
    """Pairs side by side -> first members, then second members."""
    return t.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _side_by_side(t: Tensor, dim: int = 0) -> Tensor:
    """The inverse of _halves."""
    return t.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
